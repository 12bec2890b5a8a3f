"""What a study found, on one HTML page that loads nothing: front, curves, heat maps, a table to sort, recipes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ..report import pages, plots, sentences
from ..report.document import Report
from ..report.energy import by_block, energy_lost
from ..report.page import yaml_text
from ..report.pages import Section
from ..report.plots import Point, Spectrum
from ..report.reading import Spectra
from . import table as tables
from .study import Study
from .table import DONE, Row

if TYPE_CHECKING:
    from ..report.figures import Drawing

HERE = Path(__file__).parent / "templates"
HEAT_ROWS = 48  # the most that one heat map shows
OVER_TEXTS = {"ratio": "perplexity ratio", "worst": "worst perplexity ratio"}
TEXTS = {
    "all": "all texts",
    "calibrated": "texts of calibration",
    "unseen": "texts that calibrated nothing",
}
SHARES = "The part of its basis's energy that each direction holds, the mean over spaces of a kind."


@dataclass(frozen=True)
class Results:
    """A study and what its runs gave, by run."""

    study: Study
    rows: Sequence[Row]
    reports: Mapping[str, Report]
    spectra: Mapping[str, Spectra]

    @cached_property
    def done(self) -> list[Row]:
        return [r for r in self.rows if r["status"] == DONE]

    @cached_property
    def runs(self) -> list[Row]:
        """One row a run; variants of one recipe share theirs."""
        return list({r["run"]: r for r in self.done}.values())

    @cached_property
    def best(self) -> set[str]:
        """The runs on the front."""
        return tables.front(self.done, (self.costs[0], self.study.options.y[0]))

    def name(self, r: Row, without: Sequence[str] = ()) -> str:
        """What a run has of the factors, seeds and what varies along a curve left out."""
        factors = [f for f in self.study.factors if f != "seed" and f not in without and f in r]
        return " · ".join(str(r[f]) for f in factors) or "all"

    def series(self, r: Row) -> str:
        return self.name(r, self.along)

    @cached_property
    def x(self) -> str | None:
        """What the curves run over: the study's `x`, or the factor with the most numbers."""
        if self.study.options.x is not None:
            return self.study.options.x
        counts = {f: len({r[f] for r in self.done}) for f in self.numbers}
        most = max(counts, key=lambda f: counts[f], default=None)
        return most if most is not None and counts[most] > 1 else None

    @cached_property
    def numbers(self) -> list[str]:
        """The factors whose values are numbers; seeds are none."""
        values = {f: {r.get(f) for r in self.done} for f in self.study.factors if f != "seed"}
        return [f for f, found in values.items() if found and all(map(tables.is_number, found))]

    @cached_property
    def along(self) -> list[str]:
        """The factors that vary along a curve: its x, or all numbers where that is a column of the results."""
        if self.x is None:
            return []
        return [self.x] if self.x in self.study.factors else self.numbers

    @cached_property
    def costs(self) -> list[str]:
        """The costs that tell the runs apart."""
        return tables.cost_axes(self.done)

    def title(self, name: str) -> str:
        """What a factor or a column is called."""
        what, _, group = name.partition(".")
        if what in OVER_TEXTS and group in tables.GROUPS:
            return f"{OVER_TEXTS[what]}, {TEXTS[group]}"
        return self.study.titles.get(name, name.replace("_", " "))

    def file(self, figure: str, drawn: str, axis: str = "") -> str:
        """The name of a figure of one column; that of the first is the shortest."""
        column = "" if drawn == self.study.options.y[0] else drawn.replace(".", "-")
        return "-".join(part for part in (figure, column, axis) if part)


def page(found: Results, drawn: Sequence[Drawing]) -> str:
    """One HTML file that holds everything it shows."""

    def of(*names: str) -> list[Drawing]:
        return [d for d in drawn if d.name.startswith(names)]

    later = [
        Section("Layer by layer", drawings=of("widths", "kept", "cut")),
        Section("Spectra", [SHARES], drawings=of("spectra")),
    ]
    return pages.page(
        "study",
        folder=HERE,
        script=(HERE / "study.js").read_text(encoding="utf-8"),
        title=f"{found.study.name} · invariance",
        kicker="Ablation study · invariance",
        heading=found.study.name,
        lead=[_summary(found)],
        sections=[
            Section("Cost and loss", drawings=of("front"), missing="No run was measured."),
            *([Section("Curves", drawings=of("curves"))] if of("curves") else []),
        ],
        later=[section for section in later if section.drawings],
        columns=[(n, found.title(n)) for n in _columns(found)],
        runs=[_cells(found, r) for r in found.rows],
        reasons=[f"{found.name(r)}: {r['reason']}" for r in found.rows if r.get("reason")],
        recipes=[
            (r["run"], found.name(r), yaml_text(found.reports[r["run"]].recipe)) for r in found.runs
        ],
    )


def _summary(found: Results) -> str:
    states = [r["status"] for r in found.rows]
    said = ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states)) or "none"
    ahead = len({r["run"] for r in found.rows} & found.best)
    varies = ", ".join(found.study.factors)
    return f"What varies: {varies}. Runs: {said}; on the front: {ahead}."


def _columns(found: Results) -> list[str]:
    return [*found.study.factors, *tables.shown(found.rows), "status"]


def _cells(found: Results, r: Row) -> dict[str, Any]:
    """A row of the table: every cell with the value that it is sorted by."""
    values = [(tables.cell(n, r.get(n)), r.get(n)) for n in _columns(found)]
    cells = [(said, "" if value is None else str(value)) for said, value in values]
    link = f"#recipe-{r['run']}" if r["status"] == DONE else None
    return {"cells": cells, "link": link, "best": r["run"] in found.best, "why": r.get("reason")}


def figures(found: Results) -> list[Drawing]:
    """Everything that the page draws, to write as files too."""
    if not found.done:
        return []
    drawn = [
        *(_front(found, axis, y) for y in found.study.options.y for axis in found.costs),
        *(_curves(found, y) for y in found.study.options.y),
        *_layers(found),
        *_spectra(found),
    ]
    return [each for each in drawn if each is not None]


def _front(found: Results, axis: str, drawn: str) -> Drawing | None:
    """A column over one cost, with those runs ringed that no other beats in both."""
    best = tables.front(found.done, (axis, drawn))
    what, over = found.title(drawn), axis.replace("_", " ")
    series: dict[str, list[Point]] = {}
    for r in found.done:
        x, y = r.get(axis), r.get(drawn)
        if x is not None and y is not None:
            said = f"{found.name(r)}: {tables.cell(axis, x)} {axis}, {what} {tables.cell(drawn, y)}"
            error = r.get(f"{drawn}_error") or 0.0
            point = Point(x, y, error, said, f"#recipe-{r['run']}", r["run"] in best)
            series.setdefault(found.series(r), []).append(point)
    if not series:
        return None
    name = found.file("front", drawn, "" if axis == found.costs[0] else axis)
    caption = (
        "a point leads to its recipe; ringed: on the front; bars: one standard error over windows"
    )
    return plots.curves(
        name, f"{what.capitalize()} over {over}", caption, series, (over, what), lines=False
    )


def _curves(found: Results, drawn: str) -> Drawing | None:
    """The mean of a column along what varies, a line a series."""
    if found.x is None:
        return None
    groups: dict[str, dict[float, list[Row]]] = {}
    for r in found.done:
        if r.get(drawn) is not None and tables.is_number(r.get(found.x)):
            groups.setdefault(found.series(r), {}).setdefault(r[found.x], []).append(r)
    series = {
        name: [
            Point(x, fmean(r[drawn] for r in runs), tables.spread(runs, drawn) or 0.0)
            for x, runs in sorted(places.items())
        ]
        for name, places in groups.items()
    }
    if not series:
        return None
    over, what = found.title(found.x), found.title(drawn)
    caption = (
        "bars: one standard error, over runs at one place such as seeds, or over windows of one run"
    )
    name = found.file("curves", drawn)
    return plots.curves(name, f"{what.capitalize()} over {over}", caption, series, (over, what))


def _layers(found: Results) -> list[Drawing]:
    """Widths and lost energies by layer, kind by kind, of every run that cut there."""
    drawn = []
    widths = {r["run"]: sentences.spaces(found.reports[r["run"]]) for r in found.runs}
    for kind in dict.fromkeys(kind for each in widths.values() for kind in each):
        title = sentences.kind_words(kind)
        names, kept, lost, front = [], [], [], {}
        for r in found.runs:
            spaces = widths[r["run"]].get(kind, [])
            if any(w.kept < w.dim for w in spaces):
                names.append(found.name(r))
                kept.append(by_block({w.name: w.kept / max(w.dim, 1) for w in spaces}))
                cut = energy_lost(found.spectra[r["run"]], {w.name: w.kept for w in spaces})
                lost.append(by_block(cut))
                if r["run"] in found.best:
                    front[names[-1]] = kept[-1]
        if front:
            said = "share of each block's width that is kept, runs on the front"
            drawn.append(plots.layers(f"widths-{kind}", f"Widths of the {title}", said, front, 1.0))
        for file, what, rows in (("kept", "Width kept", kept), ("cut", "Energy cut", lost)):
            if any(v is not None for values in rows for v in values):
                said = "a share, by block (across) and run (down)"
                if len(rows) > HEAT_ROWS:
                    said += f", the first {HEAT_ROWS} of {len(rows)} runs"
                shown = (names[:HEAT_ROWS], rows[:HEAT_ROWS])
                drawn.append(plots.heat(f"{file}-{kind}", f"{what}: {title}", said, *shown))
    return drawn


def _spectra(found: Results) -> list[Drawing]:
    """The spectra of each kind of space, one curve for all runs with the same bases."""
    kinds: dict[str, dict[tuple[float, ...], Spectrum]] = {}
    for r in found.runs:
        report = found.reports[r["run"]]
        each: dict[str, list[Spectrum]] = {}
        for name, energies in found.spectra[r["run"]].items():
            unit = Spectrum(name, "", energies, len(energies))
            each.setdefault(sentences.kind_of(report, name), []).append(unit)
        for kind, units in each.items():
            longest = max(len(u.energies) for u in units)
            alike = [u for u in units if len(u.energies) == longest and len(set(u.energies)) > 1]
            if alike:
                mean = [fmean(shares) for shares in zip(*(u.shares for u in alike), strict=True)]
                same = tuple(round(e, 9) for e in mean)
                curves = kinds.setdefault(kind, {})
                color = f"C{len(curves) % 10}"
                curves.setdefault(same, Spectrum(found.series(r), color, mean, longest))
    drawn = []
    for kind, curves in kinds.items():
        caption = f"{len(curves)} sets of bases, mean over the spaces"
        title = f"Spectra of the {sentences.kind_words(kind)}"
        drawn.append(plots.spectra(f"spectra-{kind}", title, caption, list(curves.values())))
    return drawn
