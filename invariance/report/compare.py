"""Two reports or more side by side: numbers, widths and energies cut layer by layer, sampled texts. The first is the measure."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any
from xml.etree.ElementTree import Element

from rich.table import Table
from rich.text import Text

from ..core.errors import InputError
from . import charts, quantize_words, study_charts, words
from .charts import el
from .energy import by_block, energy_lost
from .study_charts import Series

Report = dict[str, Any]
Show = Callable[[float | None, float | None], str]


@dataclass(frozen=True)
class Side:
    """A report and the name that tells it from the others."""

    name: str
    report: Report
    spectra: Mapping[
        str, Sequence[float]
    ]  # a unit's first space → its energies; empty where none lie beside


def load(paths: Sequence[Path]) -> list[Side]:
    """The reports of runs, named by their folders. Raises InputError."""
    if len(paths) < 2:
        raise InputError(f"{paths[0]}: one run has nothing to be compared with. Give two or more.")
    return [
        Side(name, _report(path), _spectra(path))
        for name, path in zip(_names(paths), paths, strict=True)
    ]


def _names(paths: Sequence[Path]) -> list[str]:
    """The folders' names, as much of their paths as tells them apart."""
    folders = [(p.parent if p.name == "report.json" else p).resolve() for p in paths]
    for parts in range(1, max(len(f.parts) for f in folders) + 1):
        names = ["/".join(f.parts[-parts:]) for f in folders]
        if len(set(names)) == len(set(folders)):
            break
    return [
        f"{n} ({names[: i + 1].count(n)})" if names.count(n) > 1 else n for i, n in enumerate(names)
    ]


def _report(path: Path) -> Report:
    file = path / "report.json" if path.is_dir() else path
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as e:
        raise InputError(
            f"{file}: {e.strerror}. Give the folder that `invariance run` wrote."
        ) from None
    except ValueError as e:
        raise InputError(
            f"{file}: not valid JSON ({e}). Give the folder that `invariance run` wrote."
        ) from None
    if not isinstance(found, dict) or not {"model", "parameters", "widths"} <= set(found):
        raise InputError(
            f"{file}: no report of a run. Give the folder that `invariance run` wrote."
        )
    return found


def _spectra(path: Path) -> dict[str, list[float]]:
    """The energies beside a report. Raises InputError."""
    file = (path if path.is_dir() else path.parent) / "spectra.json"
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as e:
        raise InputError(f"{file}: not valid JSON ({e}). Remove it, or run again.") from None


def numbers(sides: Sequence[Side]) -> dict[str, tuple[list[float | None], Show]]:
    """Quantity → what every side has of it, and how it is shown."""
    found: dict[str, tuple[list[float | None], Show]] = {}
    each = [_rows(side.report) for side in sides]
    for name, show in {n: s for rows in each for n, (_, s) in rows.items()}.items():
        found[name] = [rows[name][0] if name in rows else None for rows in each], show
    return found


def _rows(report: Report) -> dict[str, tuple[float | None, Show]]:
    rows = [
        *words.parameters(report)[:1],
        words.blocks(report),
        *words.costs(report),
        words.speed(report),
    ]
    rows += words.perplexities(report)
    found: dict[str, tuple[float | None, Show]] = {row.name: (row.sliced, row.show) for row in rows}
    found |= {
        f"{r.name}, recovered": (r.recovered, r.show) for r in rows if r.recovered is not None
    }
    below = [*zip(words.perplexities(report), quantize_words.perplexities(report), strict=True)]
    found |= {f"{r.name}, quantised": (q.sliced, q.show) for r, q in below if q is not None}
    for packed in quantize_words.sizes(report)[1:]:
        found["bytes of weights, quantised"] = packed.sliced, packed.show
    found["seconds"] = sum((report.get("seconds") or {}).values()), words.rate
    return found


def layers(sides: Sequence[Side]) -> dict[str, dict[str, list[int | None]]]:
    """Kind → space → its width in every report, those spaces that not all have alike."""
    found: dict[str, dict[str, list[int | None]]] = {}
    each = [{w.name: w.kept for ws in words.spaces(s.report).values() for w in ws} for s in sides]
    for name in sorted(dict.fromkeys(n for widths in each for n in widths), key=words.order):
        kept = [widths.get(name) for widths in each]
        if len(set(kept)) > 1:
            kind = next(
                words.kind_of(s.report, name) for s, w in zip(sides, each, strict=True) if name in w
            )
            found.setdefault(kind, {})[name] = kept
    return found


def energy(sides: Sequence[Side]) -> dict[str, list[list[float | None]]]:
    """Kind → for every report, block by block, the share of its bases' energy that is cut; kinds of which some is."""
    found: dict[str, list[list[float | None]]] = {}
    for n, side in enumerate(sides):
        for kind, spaces in words.spaces(side.report).items():
            widths = {w.name: w.kept for w in spaces}
            whole = {name: 0.0 for name, e in side.spectra.items() if widths.get(name) == len(e)}
            cut = {n: v for n, v in energy_lost(side.spectra, widths).items() if math.isfinite(v)}
            found.setdefault(kind, [[] for _ in sides])[n] = by_block(whole | cut)
    return {kind: each for kind, each in found.items() if any(v for values in each for v in values)}


WRITTEN = ("quantized", "recovered", "sliced")  # sides; the first that there is was written to disk
DENSE = "the dense model"  # beside runs, of which one may be called `dense`


def samples(sides: Sequence[Side]) -> dict[str, dict[str, str]]:
    """Prompt → side → its text, for prompts that two sides have or more; beside them the first dense model's."""
    found: dict[str, dict[str, str]] = {}
    for side in sides:
        for sample in side.report.get("samples") or []:
            texts = found.setdefault(sample["prompt"], {DENSE: sample.get("dense") or words.NONE})
            texts[side.name] = next((sample[s] for s in WRITTEN if sample.get(s)), words.NONE)
    return {prompt: texts for prompt, texts in found.items() if len(texts) > 2}


def document(sides: Sequence[Side]) -> dict[str, Any]:
    """The comparison as plain data."""
    return {
        "runs": [side.name for side in sides],
        "numbers": {name: values for name, (values, _) in numbers(sides).items()},
        "widths": layers(sides),
        "energy_cut": energy(sides),
        "samples": samples(sides),
    }


def _cells(values: Sequence[float | None], show: Show) -> list[str]:
    """Values, those after the first with their ratio to it."""
    top = max((v for v in values if v is not None), default=None)
    first, *others = values
    return [show(first, top), *(f"{show(v, top)}  {words.ratio(first, v)}" for v in others)]


def tables(sides: Sequence[Side]) -> list[Any]:
    """The comparison for the terminal."""
    names = [s.name for s in sides]
    sizes = _table(["", *names], "numbers; ratios are to the first")
    for column in sizes.columns[1:]:
        column.justify = "right"
    for name, (values, show) in numbers(sides).items():
        sizes.add_row(Text(name), *_cells(values, show))
    found: list[Any] = [sizes]
    for kind, spaces in layers(sides).items():
        table = _table(["space", *names], f"widths that differ: {words.kind_words(kind)}")
        for first, last in _spans(sides, kind, spaces):
            span = first if first == last else f"{first} – {last}"
            table.add_row(span, *(words.NONE if k is None else str(k) for k in spaces[first]))
        found.append(table)
    if lost := energy(sides):
        table = _table(["", *names], "energy of a run's own bases that is cut, mean over blocks")
        for kind, each in lost.items():
            means = [
                fmean(known) if (known := [v for v in e if v is not None]) else None for e in each
            ]
            cells = (words.NONE if mean is None else f"{mean:.2%}" for mean in means)
            table.add_row(words.kind_words(kind), *cells)
        found.append(table)
    for prompt, texts in samples(sides).items():
        table = _table(list(texts), prompt)
        table.expand, table.title_justify = True, "left"
        for column in table.columns:
            column.ratio = 1
        table.add_row(*(Text(t.strip()) for t in texts.values()))
        found.append(table)
    return found


def _spans(
    sides: Sequence[Side], kind: str, spaces: dict[str, list[int | None]]
) -> list[tuple[str, str]]:
    """First and last of spaces that follow each other, with none between that is left out, and have the same widths."""
    every = {width.name for side in sides for width in words.spaces(side.report).get(kind, [])}
    places = {name: n for n, name in enumerate(sorted(every, key=words.order))}
    listed = enumerate(spaces)
    groups = [
        [name for _, name in g]
        for _, g in groupby(listed, lambda e: (spaces[e[1]], places[e[1]] - e[0]))
    ]
    return [(names[0], names[-1]) for names in groups]


def _table(columns: Sequence[str], title: str) -> Table:
    """An empty table; names and titles are text, whatever brackets they hold."""
    table = Table(title=Text(title))
    for name in columns:
        table.add_column(Text(name, overflow="fold"))
    return table


def page(sides: Sequence[Side]) -> str:
    """The comparison as one HTML page that loads nothing."""
    names = [s.name for s in sides]
    rows: list[Sequence[Element | str]] = [
        [n, *_cells(v, show)] for n, (v, show) in numbers(sides).items()
    ]
    body = [
        el("p", "Comparison · invariance", class_="soft"),
        el("h1", " · ".join(names)),
        el("h2", "Numbers"),
        charts.table("Ratios are to the first.", ["What", *names], rows),
        el("h2", "Widths that differ"),
    ]
    looks = {s.name: study_charts.look(n, len(sides)) for n, s in enumerate(sides)}
    figures = [_widths(sides, kind) for kind in layers(sides)]
    body += (
        [el("div", *figures, class_="charts"), study_charts.legend(looks)]
        if figures
        else [el("p", "None.")]
    )
    said = "share of each block's energy, as the run's own basis counts it, that is cut"
    if figures := [
        _figure(sides, kind, "Energy cut", said, each, 0.0) for kind, each in energy(sides).items()
    ]:
        charted = el("div", *figures, class_="charts")
        body += [el("h2", "Energy cut"), charted, study_charts.legend(looks)]
    for prompt, texts in samples(sides).items():
        cells = (el("div", el("h3", name), el("p", text.strip())) for name, text in texts.items())
        body += [el("h2", "Samples"), el("div", el("p", el("b", prompt)), *cells, class_="sample")]
    return charts.document("Comparison · invariance", *body, style=study_charts.STYLE)


def _widths(sides: Sequence[Side], kind: str) -> Element:
    """The widths of one kind by block, a line a run."""
    every = [words.spaces(side.report).get(kind, []) for side in sides]
    each = [by_block({w.name: w.kept / max(w.dim, 1) for w in widths}) for widths in every]
    return _figure(sides, kind, "Widths", "share of each block's width that is kept", each, 1.0)


def _figure(
    sides: Sequence[Side],
    kind: str,
    what: str,
    said: str,
    each: Sequence[Sequence[float | None]],
    top: float,
) -> Element:
    """A value of one kind by block, a line a run."""
    series = []
    for n, (side, values) in enumerate(zip(sides, each, strict=True)):
        if points := [(float(b), v, v, v) for b, v in enumerate(values) if v is not None]:
            series.append(Series(side.name, study_charts.look(n, len(sides)), points))
    title = words.kind_words(kind)
    caption = el("figcaption", el("b", title), f" · {said}")
    return el("figure", caption, study_charts.layers(f"{what} of the {title}", series, top))
