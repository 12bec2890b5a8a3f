"""What a study found, on one HTML page that loads nothing: front, curves, heat maps, a table to sort, recipes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any
from xml.etree.ElementTree import Element

from ..report import charts, study_charts, words
from ..report.charts import el
from ..report.energy import by_block, energy_lost
from ..report.study_charts import Point, Series
from . import table as tables
from .study import Study
from .table import DONE, Row

Reports = Mapping[str, Mapping[str, Any]]
Spectra = Mapping[str, Mapping[str, Sequence[float]]]
HEAT_ROWS = 48  # the most that one heat map shows

SCRIPT = """
for (const button of document.querySelectorAll('th button')) {
  button.addEventListener('click', () => {
    const head = button.closest('th'), table = head.closest('table'), body = table.tBodies[0];
    const column = [...head.parentNode.children].indexOf(head);
    const down = head.getAttribute('aria-sort') === 'ascending';
    for (const other of head.parentNode.children) other.removeAttribute('aria-sort');
    head.setAttribute('aria-sort', down ? 'descending' : 'ascending');
    const value = row => row.children[column].dataset.v ?? '';
    const compare = (a, b) => {
      const x = value(a), y = value(b);
      if (x === '' || y === '') return (x === '') - (y === '');
      const known = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
      return down ? -known : known;
    };
    for (const row of [...body.rows].sort(compare)) body.append(row);
  });
}
const open = () => {
  const found = location.hash && document.getElementById(location.hash.slice(1));
  if (found && found.closest('details')) { found.closest('details').open = true; found.scrollIntoView(); }
};
addEventListener('hashchange', open);
open();
"""


def page(
    study: Study,
    rows: Sequence[Row],
    reports: Reports,
    spectra: Spectra,
    recipes: Mapping[str, str],
) -> str:
    """One HTML file that holds everything it shows."""
    done = [r for r in rows if r["status"] == DONE]
    best = tables.front(done, (tables.cost_axes(done)[0], "perplexity"))
    looks = _looks(study, done)
    body = [
        el("p", "Ablation study · invariance", class_="soft"),
        el("h1", study.name),
        el("p", _summary(study, rows, best)),
        *_fronts(study, done, looks),
        *_curves(study, done, looks),
        *_table(study, rows, best),
        *_layers(study, done, best, reports, spectra, looks),
        *_spectra(study, done, reports, spectra, looks),
        *_recipes(study, done, recipes),
    ]
    return charts.document(
        f"{study.name} · invariance", *body, script=SCRIPT, style=study_charts.STYLE
    )


def _summary(study: Study, rows: Sequence[Row], best: set[str]) -> str:
    counts = {
        s: sum(r["status"] == s for r in rows) for s in dict.fromkeys(r["status"] for r in rows)
    }
    said = ", ".join(f"{n} {status}" for status, n in counts.items()) or "none"
    ahead = len({r["run"] for r in rows} & best)
    return f"What varies: {', '.join(study.factors)}. Runs: {said}; on the front: {ahead}."


def _series_name(study: Study, r: Row, without: Sequence[str] = ()) -> str:
    """What a run has of the factors, seeds and the curves' x left out."""
    left = [str(r[f]) for f in study.factors if f != "seed" and f not in without and f in r]
    return " · ".join(left) or "all"


def _x(study: Study, done: Sequence[Row]) -> str | None:
    """What the curves run over: the study's `x`, or the factor with the most numbers."""
    if study.options.x is not None:
        return study.options.x
    counts = {f: len({r[f] for r in done}) for f in _numbers(study, done)}
    return max(counts, key=lambda f: counts[f]) if counts and max(counts.values()) > 1 else None


def _numbers(study: Study, done: Sequence[Row]) -> list[str]:
    """The factors whose values are numbers; seeds are none."""
    values = {f: {r.get(f) for r in done} for f in study.factors if f != "seed"}
    return [f for f, found in values.items() if found and all(map(tables.is_number, found))]


def _along(study: Study, done: Sequence[Row]) -> list[str]:
    """The factors that vary along a curve: its x, or all numbers where that is a column of the results."""
    x = _x(study, done)
    return [] if x is None else [x] if x in study.factors else _numbers(study, done)


def _said(study: Study, x: str | None) -> str:
    """What a factor or a column is called."""
    return "" if x is None else study.titles.get(x, x.replace("_", " "))


def _looks(study: Study, done: Sequence[Row]) -> dict[str, str]:
    """Series → what it looks like in every chart."""
    names = list(dict.fromkeys(_series_name(study, r, _along(study, done)) for r in done))
    return {name: study_charts.look(n, len(names)) for n, name in enumerate(names)}


def figures(study: Study, rows: Sequence[Row]) -> dict[str, str]:
    """The charts of costs and of curves as SVG files of their own, by name."""
    done = [r for r in rows if r["status"] == DONE]
    looks = _looks(study, done)
    drawn = {
        "front": _front(study, done, tables.cost_axes(done)[0], looks),
        "curves": _lines(study, done, looks),
    }
    return {
        name: study_charts.alone(chart, looks) for name, chart in drawn.items() if chart is not None
    }


def _front(
    study: Study, done: Sequence[Row], axis: str, looks: Mapping[str, str]
) -> Element | None:
    """Perplexity over one cost, with those runs ringed that no other beats in both."""
    along, best = _along(study, done), tables.front(done, (axis, "perplexity"))
    points = [
        Point(
            r["run"],
            f"{_series_name(study, r)}: {tables.cell(axis, r[axis])} {axis}, perplexity {r['perplexity']:.2f}",
            r[axis],
            r["perplexity"],
            looks[_series_name(study, r, along)],
            r["run"] in best,
        )
        for r in done
        if r.get("perplexity") is not None and r.get(axis) is not None
    ]
    if not points:
        return None
    return study_charts.scatter(f"Perplexity over {axis}", points, axis.replace("_", " "))


def _fronts(study: Study, done: Sequence[Row], looks: Mapping[str, str]) -> list[Element]:
    """A chart for each cost that tells the runs apart."""
    figures = [
        el(
            "figure",
            el(
                "figcaption",
                el("b", "Perplexity"),
                f" over {axis.replace('_', ' ')}; a point leads to its recipe",
            ),
            drawn,
        )
        for axis in tables.cost_axes(done)
        if (drawn := _front(study, done, axis, looks)) is not None
    ]
    if not figures:
        return [el("h2", "Cost and loss"), el("p", "No run was measured.", class_="soft")]
    whole = el("div", *figures, class_="charts") if len(figures) > 1 else figures[0]
    return [el("h2", "Cost and loss"), whole, study_charts.legend(looks)]


def _lines(study: Study, done: Sequence[Row], looks: Mapping[str, str]) -> Element | None:
    x = _x(study, done)
    if x is None:
        return None
    along = _along(study, done)
    groups: dict[str, dict[float, list[float]]] = {}
    for r in done:
        if r.get("perplexity") is not None and isinstance(r.get(x), int | float):
            groups.setdefault(_series_name(study, r, along), {}).setdefault(r[x], []).append(
                r["perplexity"]
            )
    series = [
        Series(
            name, looks[name], [(a, min(ys), fmean(ys), max(ys)) for a, ys in sorted(found.items())]
        )
        for name, found in groups.items()
    ]
    said = _said(study, x)
    return study_charts.curves(f"Perplexity over {said}", series, said) if series else None


def _curves(study: Study, done: Sequence[Row], looks: Mapping[str, str]) -> list[Element]:
    drawn = _lines(study, done, looks)
    if drawn is None:
        return []
    caption = el(
        "figcaption",
        el("b", "Perplexity"),
        f" over {_said(study, _x(study, done))}; a band spans runs at one place, such as seeds",
    )
    return [el("h2", "Curves"), el("figure", caption, drawn), study_charts.legend(looks)]


def _table(study: Study, rows: Sequence[Row], best: set[str]) -> list[Element]:
    names = [*study.factors, *tables.shown(rows), "status"]
    titles = [_said(study, n) for n in names]
    button = [
        el("th", el("button", t, type="button", title=n), scope="col")
        for n, t in zip(names, titles, strict=True)
    ]
    body = []
    for r in rows:
        link = (
            el("a", str(r.get(names[0])), href=f"#recipe-{r['run']}")
            if r["status"] == DONE
            else str(r.get(names[0]))
        )
        first = el("th", link, scope="row", data_v=_sortable(r.get(names[0])))
        cells = [
            el("td", tables.cell(n, r.get(n)), data_v=_sortable(r.get(n))) for n in names[1:-1]
        ]
        status = el("td", r["status"], title=r.get("reason"), data_v=r["status"])
        body.append(el("tr", first, *cells, status, class_="best" if r["run"] in best else None))
    whole = el(
        "table",
        el("caption", "Every run; a heading sorts, a name leads to its recipe."),
        el("thead", el("tr", *button)),
        el("tbody", *body),
        id="runs",
    )
    failed = [
        el("p", f"{_series_name(study, r)}: {r['reason']}", class_="soft")
        for r in rows
        if r.get("reason")
    ]
    return [el("h2", "Runs"), el("div", whole, class_="scroll"), *failed]


def _sortable(value: Any) -> str:
    return "" if value is None else str(value)


def _layers(
    study: Study,
    done: Sequence[Row],
    best: set[str],
    reports: Reports,
    spectra: Spectra,
    looks: Mapping[str, str],
) -> list[Element]:
    """Widths and lost energies by layer, kind by kind, of every run that cut there."""
    along = _along(study, done)
    figures = []
    kinds = list(dict.fromkeys(k for r in done for k in words.spaces(reports[r["run"]])))
    for kind in kinds:
        names, kept, lost, lines = [], [], [], []
        for r in {r["run"]: r for r in done}.values():
            widths = words.spaces(reports[r["run"]]).get(kind, [])
            if all(w.kept == w.dim for w in widths):
                continue
            names.append(_series_name(study, r))
            share = by_block({w.name: w.kept / max(w.dim, 1) for w in widths})
            kept.append(share)
            lost.append(by_block(energy_lost(spectra[r["run"]], {w.name: w.kept for w in widths})))
            if r["run"] in best:
                points = [(float(n), v, v, v) for n, v in enumerate(share) if v is not None]
                lines.append(Series(names[-1], looks[_series_name(study, r, along)], points))
        title = words.kind_words(kind)
        if lines:
            figures.append(
                _figure(
                    title,
                    "share of each block's width that is kept, runs on the front",
                    study_charts.layers(f"Widths of the {title}", lines),
                )
            )
        for said, rows in (("width kept", kept), ("energy cut", lost)):
            if any(v is not None for found in rows for v in found):
                drawn = study_charts.heat(
                    f"{said}, {title}",
                    names[:HEAT_ROWS],
                    rows[:HEAT_ROWS],
                    f"of the {said.split()[0]}",
                )
                left = (
                    f", the first {HEAT_ROWS} of {len(rows)} runs" if len(rows) > HEAT_ROWS else ""
                )
                figures.append(
                    _figure(
                        title, f"{said} by block (across) and run (down), as a share{left}", drawn
                    )
                )
    return [el("h2", "Layer by layer"), el("div", *figures, class_="charts")] if figures else []


def _spectra(
    study: Study, done: Sequence[Row], reports: Reports, spectra: Spectra, looks: Mapping[str, str]
) -> list[Element]:
    """The spectra of each kind of space, one curve for all runs with the same bases."""
    along = _along(study, done)
    found: dict[str, dict[tuple[float, ...], charts.Curve]] = {}
    for r in {r["run"]: r for r in done}.values():
        report = reports[r["run"]]
        kinds: dict[str, list[charts.Curve]] = {}
        for name, energies in spectra[r["run"]].items():
            kept = report["widths"].get(name, len(energies))
            kinds.setdefault(words.kind_of(report, name), []).append(
                charts.Curve(name, "", energies, kept)
            )
        for kind, each in kinds.items():
            longest = max(len(c.energies) for c in each)
            alike = [c for c in each if len(c.energies) == longest and len(set(c.energies)) > 1]
            if alike:
                mean = tuple(
                    fmean(shares) for shares in zip(*(c.shares for c in alike), strict=True)
                )
                name = _series_name(study, r, along)
                curve = charts.Curve(name, looks[name], mean, longest)
                found.setdefault(kind, {}).setdefault(tuple(round(e, 9) for e in mean), curve)
    figures = [
        _figure(
            words.kind_words(kind),
            f"{len(each)} sets of bases, mean over the spaces",
            charts.spectra_chart(
                f"Spectra of the {words.kind_words(kind)}", "Falling energies", list(each.values())
            ),
        )
        for kind, each in found.items()
    ]
    said = (
        "The part of its basis's energy that each direction holds, the mean over spaces of a kind."
    )
    return (
        [el("h2", "Spectra"), el("p", said), el("div", *figures, class_="charts")]
        if figures
        else []
    )


def _figure(kind: str, caption: str, drawn: Element) -> Element:
    return el("figure", el("figcaption", el("b", kind), f" · {caption}"), drawn)


def _recipes(study: Study, done: Sequence[Row], recipes: Mapping[str, str]) -> list[Element]:
    found = []
    for r in {r["run"]: r for r in done}.values():
        command = f"invariance run runs/{r['run']}/recipe.yaml --output again"
        text = el("pre", f"# {command}\n{recipes[r['run']]}", id=f"recipe-{r['run']}", tabindex=0)
        found.append(el("details", el("summary", f"{_series_name(study, r)} ({r['run']})"), text))
    return [el("h2", "Recipes"), *found]
