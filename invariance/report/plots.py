"""What reports draw: widths and spectra over depth, errors, curves with error bars, points over costs, heat maps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .figures import (
    HEIGHT,
    INK,
    KEPT,
    OTHER,
    ROW,
    SOFT,
    WHOLE,
    Drawing,
    ceiling,
    clean,
    clip,
    drawing,
    elided,
    legend,
    look,
    scale,
    shade,
)
from .units import short

POINTS = 128  # the most that are drawn of one spectrum
LABEL = 40  # letters of a name beside a heat map
DECADES = 12  # the most that a spectrum falls before it leaves the figure


@dataclass(frozen=True)
class Width:
    """How much of one space is kept."""

    name: str
    block: int
    kept: int
    dim: int


@dataclass(frozen=True)
class Spectrum:
    """The energies of one unit's directions, falling, and how many are kept; ``color`` is a place in depth or a name."""

    name: str
    color: Any
    energies: Sequence[float]
    kept: int

    @property
    def shares(self) -> list[float]:
        """Each direction's part of the unit's energy."""
        finite = [e if math.isfinite(e) and e > 0 else 0.0 for e in self.energies]
        largest = max(finite, default=0.0) or 1.0
        total = math.fsum(e / largest for e in finite) or 1.0
        return [e / largest / total for e in finite]


@dataclass(frozen=True)
class Point:
    """A value at a place, with its standard error, what it says, and whether no other is better in both."""

    x: float
    y: float
    error: float = 0.0
    said: str = ""
    link: str | None = None
    best: bool = False


Series = Mapping[str, Sequence[Point]]  # name → its points


def widths(name: str, title: str, caption: str, spaces: Sequence[Width]) -> Drawing:
    """Spaces from first to last: what is kept of each, before all that there was."""
    with drawing(name, title, caption) as (made, axes):
        places = range(len(spaces))
        axes.bar(places, [s.dim for s in spaces], 0.82, color=WHOLE, label="whole")
        bars = axes.bar(places, [s.kept for s in spaces], 0.82, color=KEPT, label="kept")
        for bar, s in zip(bars, spaces, strict=True):
            bar.set_gid(made.tip(f"{s.name}: {s.kept} of {s.dim} kept"))
        starts: dict[int, int] = {}
        for n, space in enumerate(spaces):
            starts.setdefault(space.block, n)
        step = next(s for s in (1, 2, 5, 10, 20, 50, 10**6) if len(starts) <= 10 * s)
        axes.set_xticks(
            *zip(*[(n, str(b)) for b, n in starts.items() if b % step == 0], strict=True)
        )
        axes.set(xlabel="block", ylabel="width")
        axes.grid(visible=False, axis="x")
    return made


def spectra(name: str, title: str, caption: str, found: Sequence[Spectrum]) -> Drawing:
    """Falling energies on a logarithmic axis, each with its cut."""
    with drawing(name, title, caption) as (made, axes):
        cuts = {c.kept for c in found if c.kept < len(c.energies)}
        least = 10.0**-DECADES
        for each in found:
            shares = [max(s, least / 10) for s in each.shares]
            steps = max(min(len(shares), POINTS) - 1, 1)
            chosen = sorted({round(n * (len(shares) - 1) / steps) for n in range(steps + 1)})
            color = shade(each.color) if isinstance(each.color, float) else each.color
            (line,) = axes.plot([n + 1 for n in chosen], [shares[n] for n in chosen], color=color)
            energy = math.fsum(each.shares[: each.kept])
            said = f"{each.kept} of {len(shares)} directions kept, {energy:.2%} of the energy"
            line.set_gid(made.tip(f"{each.name}: {said}"))
            if len(cuts) > 1 and each.kept in cuts and each.kept < len(shares):
                axes.plot([each.kept], [shares[each.kept - 1]], ".", color=INK, markersize=4)
        if len(cuts) == 1:
            axes.axvline(cuts.copy().pop(), color=INK, linestyle="--", linewidth=0.9)
            axes.annotate(f" cut at {cuts.pop()}", (axes.get_lines()[-1].get_xdata()[0], 0.94),  # type: ignore[index]
                          xycoords=("data", "axes fraction"))  # fmt: skip
        drawn = [s for c in found for s in c.shares if s >= least] or [1.0]
        scale(axes, "y", [min(drawn), max(drawn)], "share of the energy")
        axes.set_xlabel("direction, by falling energy")
        named = {c.name: {"color": c.color} for c in found if isinstance(c.color, str)}
        if named:
            legend(made, named)
    return made


def errors(name: str, title: str, found: Mapping[str, float], limit: float) -> Drawing:
    """Named errors as bars on a logarithmic axis, with the limit."""
    with drawing(name, title, "", 0.9 + 0.32 * len(found)) as (made, axes):
        known = [v for v in (limit, *found.values()) if v > 0 and math.isfinite(v)]
        low, high = 10.0 ** (math.floor(math.log10(min([*known, 1e-16]))) - 1), max([*known, 1.0])
        values = [v if math.isfinite(v) else 10 * high for v in found.values()]
        colors = [KEPT if v <= limit else OTHER for v in values]
        axes.barh([clean(n) for n in found], [max(v, 1.5 * low) for v in values], 0.5, color=colors)
        scale(axes, "x", [low, high], "relative error of the logits")
        if limit > 0 and math.isfinite(limit):
            axes.axvline(limit, color=INK, linestyle="--", linewidth=0.9)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
    return made


def bars(name: str, title: str, unit: str, found: Mapping[str, Mapping[str, float]]) -> Drawing:
    """Medians as bars from zero, each with its quartiles."""
    with drawing(name, title, "", 0.9 + 0.28 * len(found)) as (made, axes):
        middle = [each["median"] for each in found.values()]
        below = [each["median"] - each["low"] for each in found.values()]
        above = [each["high"] - each["median"] for each in found.values()]
        style: dict[str, Any] = {
            "color": KEPT,
            "ecolor": INK,
            "capsize": 2.5,
            "error_kw": {"elinewidth": 1.0},
        }
        axes.barh([clean(n) for n in found], middle, 0.6, xerr=[below, above], **style)
        axes.set_xlabel(unit)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
    return made


def curves(
    name: str, title: str, caption: str, series: Series, labels: tuple[str, str], lines: bool = True
) -> Drawing:
    """Points over a quantity, with their standard errors: joined within a series, or (``lines`` false) with the front of
    those that no other beats. What would flatten the rest is marked at the top, and said."""
    every = [p for points in series.values() for p in points]
    top = ceiling([p.y for p in every])
    beyond = [p.y for p in every if top is not None and p.y > top]
    inside = [p for p in every if top is None or p.y <= top]
    reach = [y for p in inside for y in (p.y - p.error, p.y, p.y + p.error)]
    if min(p.y for p in inside) > 0:
        reach = [max(y, min(p.y for p in inside) / 2) for y in reach]
    with drawing(name, title, caption) as (made, axes):
        scale(axes, "x", [p.x for p in every], labels[0], exact=lines)
        scale(axes, "y", reach, labels[1])
        roof = axes.get_ylim()[1]
        for n, (said, points) in enumerate(series.items()):
            _series(made, look(n), said, points, lines, (top, roof))
        best = sorted((p.x, p.y) for p in inside if p.best)
        if best and not lines:
            axes.plot(*zip(*best, strict=True), color=SOFT, linestyle="--", linewidth=1, zorder=1)
        clip(axes, made, beyond, top)
        if len(series) > 1 or not lines:
            legend(
                made,
                {n: look(i) | ({} if lines else {"linestyle": ""}) for i, n in enumerate(series)},
            )
    return made


def _series(
    made: Drawing,
    style: Mapping[str, Any],
    name: str,
    points: Sequence[Point],
    lines: bool,
    limits: tuple[float | None, float],
) -> None:
    (axes,), (top, roof) = made.figure.axes, limits
    if lines:
        (line,) = axes.plot([p.x for p in points], [p.y for p in points], **{**style, "marker": ""})
        line.set_gid(made.tip(name))
    for p in points:
        out = top is not None and p.y > top
        if p.error and not out:
            axes.errorbar([p.x], [p.y], [p.error], color=style["color"], capsize=2.5, elinewidth=1)
        edge = {"markeredgecolor": INK, "markeredgewidth": 1.3} if p.best else {}
        mark: dict[str, Any] = {"color": style["color"], "linestyle": "", **edge}
        mark |= {"marker": "^", "clip_on": False} if out else {"marker": style["marker"]}
        (dot,) = axes.plot([p.x], [roof if out else p.y], **mark)
        if p.link is not None:
            dot.set_url(p.link)
        dot.set_gid(made.tip(p.said or f"{name}: {short(p.x)}, {p.y:.4g}"))


def layers(
    name: str, title: str, caption: str, found: Mapping[str, Sequence[float | None]], top: float
) -> Drawing:
    """A share by layer, one line a run, on an axis from 0 to ``top`` at least."""
    from matplotlib.ticker import MaxNLocator

    with drawing(name, title, caption) as (made, axes):
        for n, (said, values) in enumerate(found.items()):
            known = [(b, v) for b, v in enumerate(values) if v is not None]
            if known:
                style: dict[str, Any] = {**look(n), "markersize": 2.5}
                (line,) = axes.plot(*zip(*known, strict=True), **style)
                line.set_gid(made.tip(said))
        axes.set_ylim(0, max([1e-9, top, *(1.05 * v for vs in found.values() for v in vs if v)]))
        axes.set_xlim(-0.5, max(map(len, found.values())) - 0.5)
        axes.set(xlabel="block", ylabel="share")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        legend(made, {said: look(n) for n, said in enumerate(found)})
    return made


def heat(
    name: str,
    title: str,
    caption: str,
    names: Sequence[str],
    rows: Sequence[Sequence[float | None]],
) -> Drawing:
    """Rows of shares from 0 to 1, a column a block; what is not known is left empty."""
    import numpy
    from matplotlib import colormaps

    across = max(map(len, rows))
    grid = numpy.full((len(rows), across), numpy.nan)
    for n, values in enumerate(rows):
        grid[n, : len(values)] = [numpy.nan if v is None else v for v in values]
    with drawing(name, title, caption, HEIGHT / 2 + ROW * len(rows)) as (made, axes):
        style: dict[str, Any] = {
            "cmap": colormaps["Blues"].resampled(32),
            "edgecolor": "white",
            "linewidth": 0.4,
        }
        mesh = axes.pcolormesh(grid, vmin=0, vmax=max(1e-9, float(numpy.nanmax(grid))), **style)
        said = [elided(n, LABEL) for n in names]
        axes.set_yticks([n + 0.5 for n in range(len(rows))], said)
        step = next(s for s in (1, 2, 5, 10, 20, 50, 10**6) if across <= 10 * s)
        ticks = range(0, across, step)
        axes.set_xticks([n + 0.5 for n in ticks], [str(n) for n in ticks])
        axes.set_xlabel("block")
        axes.invert_yaxis()
        axes.grid(visible=False)
        made.figure.colorbar(mesh, ax=axes)
    return made
