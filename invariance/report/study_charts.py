"""The charts of a study as inline SVG: points over two costs, curves with bands, heat maps by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from .charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Scale, axes, el, rect, shade, svg, text
from .style import STYLE as PAGE

LOG_FROM = 5  # values whose largest is so many times the least stand on a logarithmic axis
CELL, NAMES = (
    13,
    150,
)  # of a heat map: the height of a row, and how much of its width the names take
ROW, LETTERS, BESIDE = (
    15,
    50,
    22,
)  # of a legend below a chart: a row's height, letters of a name; of two beside each other
FEW = 6  # series that colours alone tell apart
LINES = (
    ("none", "var(--shade)"),
    ("6 3", "var(--card)"),
    ("2 3", "color-mix(in oklab, var(--shade) 40%, var(--card))"),
)
FILE_STYLE = "svg { background: var(--card); font-family: system-ui, sans-serif; }"

STYLE = """
.point { fill: var(--fill, var(--shade)); stroke: var(--shade); } .thick { stroke-dasharray: var(--dash, none); }
.ring { fill: none; stroke: var(--ink); stroke-width: 1.2; }
.front { fill: none; stroke: var(--soft); stroke-dasharray: 3 3; }
.band { fill: var(--shade); opacity: .18; }
.heat { fill: color-mix(in oklab, var(--kept) calc(var(--v) * 100%), var(--whole)); }
.keys { display: flex; flex-wrap: wrap; gap: 4px 14px; }
.key svg { display: inline-block; width: 26px; height: 10px; margin: 0 5px 0 0; }
th button { all: unset; cursor: pointer; } th button:focus-visible { outline: 2px solid var(--kept); }
th[aria-sort=ascending] button::after { content: " ▲"; } th[aria-sort=descending] button::after { content: " ▼"; }
a { color: var(--kept); } tr.best th { font-weight: 650; }
details { border-top: 1px solid var(--line); padding: 8px 0; } pre:target { outline: 2px solid var(--kept); }
"""


@dataclass(frozen=True)
class Point:
    """One run in a plot: ``look`` is that of its series, ``best`` whether it lies on the front."""

    key: str
    said: str
    x: float
    y: float
    look: str
    best: bool = False


@dataclass(frozen=True)
class Series:
    """One curve: of each x the least, the mean and the largest y over the seeds."""

    name: str
    look: str
    points: Sequence[tuple[float, float, float, float]]


def look(n: int, count: int) -> str:
    """The style of one series of several: a colour, and where there are many, dashes and the filling of points too."""
    ways = LINES if count > FEW else LINES[:1]
    dash, fill = ways[n % len(ways)]
    return f"{shade(n // len(ways) / max((count - 1) // len(ways), 1))};--dash:{dash};--fill:{fill}"


@dataclass(frozen=True)
class Axis:
    """An axis of a plot, logarithmic where values differ much."""

    scale: Scale
    log: bool

    def __call__(self, value: float) -> float:
        return self.scale(math.log10(value) if self.log else value)

    @classmethod
    def over(
        cls, values: Sequence[float], start: float = HEIGHT - BOTTOM, end: float = TOP
    ) -> Axis:
        low, high = min(values), max(values)
        log = low > 0 and high / low > LOG_FROM
        low, high = (math.log10(low), math.log10(high)) if log else (low, high)
        room = 0.06 * (high - low) or abs(high) * 0.05 or 1.0
        return cls(Scale(low - room, high + room, start, end), log)

    @property
    def ticks(self) -> dict[float, str]:
        if not self.log:
            return ticks(self.scale.low, self.scale.high)
        decades = range(math.floor(self.scale.low), math.ceil(self.scale.high) + 1)
        steps = (1, 2, 5) if len(decades) <= 4 else (1,)
        marks = [m * 10.0**n for n in decades for m in steps]
        return {
            m: _short(m, m) for m in marks if self.scale.low <= math.log10(m) <= self.scale.high
        }


def ticks(low: float, high: float, most: int = 6) -> dict[float, str]:
    """Round numbers between two bounds, with short labels."""
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(step * m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= most)
    first = math.ceil(low / step - 1e-9)
    values = [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]
    return {v: _short(v, step) for v in values}


def _short(value: float, step: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 10 * size or (abs(value) >= size and step >= size / 100):
            return f"{value / size:.4g}{unit}"
    return f"{value:.6g}" if abs(value) < 1e5 else f"{value:.3g}"


def _across(values: Sequence[float]) -> Scale:
    low, high = min(values), max(values)
    room = 0.05 * (high - low) or abs(high) * 0.05 or 1.0
    return Scale(low - room, high + room, LEFT, WIDTH - RIGHT)


def scatter(title: str, points: Sequence[Point], across: str) -> Element:
    """Points that lead to their runs; those on the front are joined and ringed."""
    x, y = _across([p.x for p in points]), Axis.over([p.y for p in points])
    marks = list(axes(x, y.scale, ticks(x.low, x.high), _placed(y), across))
    best = sorted((p for p in points if p.best), key=lambda p: p.x)
    if len(best) > 1:
        path = "M" + "L".join(f"{x(p.x):.1f},{y(p.y):.1f}" for p in best)
        marks.append(el("path", d=path, class_="front"))
    for p in sorted(points, key=lambda p: p.best):
        place = {"cx": f"{x(p.x):.1f}", "cy": f"{y(p.y):.1f}"}
        dot = el("circle", el("title", p.said), **place, r="3.5", class_="point")
        ring = el("circle", **place, r="6", class_="ring") if p.best else None
        marks.append(el("a", dot, ring, href=f"#recipe-{p.key}", style=p.look, aria_label=p.said))
    return svg(title, f"{len(points)} runs, {len(best)} on the front", HEIGHT, *marks)


def _placed(y: Axis) -> dict[float, str]:
    """Labels by where they stand on the scale that the axes draw on."""
    return {(math.log10(v) if y.log else v): said for v, said in y.ticks.items()}


def curves(title: str, series: Sequence[Series], across: str) -> Element:
    """Means as lines, what lies between the seeds as bands."""
    every = [p for s in series for p in s.points]
    x, y = (
        Axis.over([p[0] for p in every], LEFT, WIDTH - RIGHT),
        Axis.over([v for p in every for v in p[1:]]),
    )
    values = sorted({p[0] for p in every})
    xs = (
        {(math.log10(v) if x.log else v): f"{v:.6g}" for v in values}
        if len(values) <= 8
        else _placed(x)
    )
    marks = list(axes(x.scale, y.scale, xs, _placed(y), across))
    for s in series:
        lows = [f"{x(a):.1f},{y(low):.1f}" for a, low, _, _ in s.points]
        highs = [f"{x(a):.1f},{y(high):.1f}" for a, _, _, high in s.points]
        means = [(x(a), y(mean)) for a, _, mean, _ in s.points]
        drawn = [el("title", s.name)]
        if lows != highs:
            drawn.append(
                el("path", d="M" + "L".join([*lows, *reversed(highs)]) + "Z", class_="band")
            )
        drawn.append(
            el("path", d="M" + "L".join(f"{a:.1f},{b:.1f}" for a, b in means), class_="curve thick")
        )
        drawn += [
            el("circle", cx=f"{a:.1f}", cy=f"{b:.1f}", r="2.6", class_="point") for a, b in means
        ]
        marks.append(el("g", *drawn, style=s.look))
    return svg(title, "; ".join(s.name for s in series), HEIGHT, *marks)


def heat(
    title: str, names: Sequence[str], rows: Sequence[Sequence[float | None]], unit: str
) -> Element:
    """Rows of values from 0 to 1, one a layer, from left to right; what is not known is left empty."""
    layers = max(len(r) for r in rows)
    x = Scale(0, layers, NAMES, WIDTH - 4)
    marks = []
    for n, (name, values) in enumerate(zip(names, rows, strict=True)):
        top = n * CELL
        marks.append(
            text(NAMES - 6, top + CELL - 3.5, name if len(name) <= 26 else name[:25] + "…", "end")
        )
        for layer, value in enumerate(values):
            if value is not None:
                box = rect(x(layer), top, x(1) - x(0) - 0.4, CELL - 1, "heat")
                box.set("style", f"--v:{min(max(value, 0.0), 1.0):.3f}")
                box.append(el("title", f"{name}, block {layer}: {value:.3g} {unit}"))
                marks.append(box)
    bottom = len(rows) * CELL + 13
    step = next(s for s in (1, 2, 5, 10, 20, 50, 10**6) if layers <= 10 * s)
    marks += [text(x(n + 0.5), bottom, str(n)) for n in range(0, layers, step)]
    return svg(title, f"{len(rows)} rows of {layers} blocks", bottom + 6, *marks)


def layers(title: str, series: Sequence[Series], top: float = 1.0) -> Element:
    """A value by layer, one line a run, on an axis from 0 to ``top`` at least."""
    every = [p for s in series for p in s.points]
    x = Scale(0, max(*(p[0] for p in every), 1), LEFT, WIDTH - RIGHT)
    y = Scale(0, max(*(p[2] for p in every), top), HEIGHT - BOTTOM, TOP)
    marks = list(axes(x, y, ticks(0, x.high), ticks(0, y.high), "block"))
    for s in series:
        path = "M" + "L".join(f"{x(a):.1f},{y(b):.1f}" for a, _, b, _ in s.points)
        marks.append(
            el("g", el("title", s.name), el("path", d=path, class_="curve thick"), style=s.look)
        )
    return svg(title, "; ".join(s.name for s in series), HEIGHT, *marks)


def _key(x: float, y: float, style: str) -> Element:
    """A piece of a series' line with one of its points."""
    stroke = el("path", d=f"M{x:.1f},{y:.1f}h24", class_="curve thick")
    return el(
        "g",
        stroke,
        el("circle", cx=f"{x + 12:.1f}", cy=f"{y:.1f}", r="3", class_="point"),
        style=style,
    )


def legend(looks: Mapping[str, str]) -> Element:
    """The names of series beside what they look like."""
    keys = (
        el("span", el("svg", _key(1, 5, style), viewBox="0 0 26 10"), name, class_="key")
        for name, style in looks.items()
    )
    return el("p", *keys, class_="legend keys")


def alone(drawn: Element, looks: Mapping[str, str]) -> str:
    """A chart as an SVG file of its own: with its style, its title above, and the names of its series below it."""
    height = float(drawn.attrib["viewBox"].split()[-1])
    keys, across = [], 2 if max(map(len, looks), default=0) <= BESIDE else 1
    for n, (name, style) in enumerate(looks.items()):
        x, y = LEFT + n % across * (WIDTH - LEFT) / across, height + ROW * (n // across) + ROW / 2
        said = name if len(name) <= LETTERS else name[: LETTERS - 1] + "…"
        keys += [_key(x, y, style), text(x + 29, y + 3.5, said, "start")]
    height += ROW * math.ceil(len(looks) / across)
    sheet = el("style", PAGE + STYLE + FILE_STYLE)
    head = text(LEFT, -6, drawn[0].text or "", "start", "strong")
    view = f"0 {-ROW - 3} {WIDTH} {height + ROW + 3:g}"
    whole = el("svg", sheet, *drawn, head, *keys, viewBox=view, width=2 * WIDTH, role="img")
    whole.set("xmlns", "http://www.w3.org/2000/svg")
    for link in whole.iter("a"):
        link.attrib.pop("href")  # leads nowhere outside the page
    return ElementTree.tostring(whole, encoding="unicode") + "\n"
