"""Two reports or more side by side: numbers, widths and energies cut layer by layer, sampled texts. The first is the measure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ..core.errors import InputError
from . import pages, plots, sentences
from .document import Mean, Report, Row
from .energy import by_block, energy_lost
from .grid import Grid
from .pages import Section
from .reading import Spectra, read, read_spectra
from .sentences import kind_words
from .units import NONE, Number, Show, folded, order, rate, ratio, within

if TYPE_CHECKING:
    from .figures import Drawing

Blocks = dict[str, dict[str, list[float | None]]]  # kind → run → a share by block
WRITTEN = ("quantized", "recovered", "sliced")  # the first that there is was written to disk
DENSE = "the dense model"  # beside runs, of which one may be called `dense`


@dataclass(frozen=True)
class Side:
    """A report and the name that tells it from the others; ``spectra`` are empty where none lie beside."""

    name: str
    report: Report
    spectra: Spectra


def load(paths: Sequence[Path]) -> list[Side]:
    """The reports of runs, named by their folders. Raises InputError."""
    if len(paths) < 2:
        raise InputError(f"{paths[0]}: one run has nothing to be compared with. Give two or more.")
    named = zip(_names(paths), paths, strict=True)
    return [Side(name, read(path), read_spectra(path)) for name, path in named]


def _names(paths: Sequence[Path]) -> list[str]:
    """The folders' names, as much of their paths as tells them apart."""
    folders = [(p.parent if p.name == "report.json" else p).resolve() for p in paths]
    for parts in range(1, max(len(f.parts) for f in folders) + 1):
        names = ["/".join(f.parts[-parts:]) for f in folders]
        if len(set(names)) == len(set(folders)):
            break
    several = {n for n in names if names.count(n) > 1}
    return [f"{n} ({names[: i + 1].count(n)})" if n in several else n for i, n in enumerate(names)]


def numbers(sides: Sequence[Side]) -> dict[str, tuple[list[Number], Show]]:
    """Quantity → what every side has of it, and how it is shown."""
    each = [{row.name: row for row in _rows(side.report)} for side in sides]
    shows = {name: row.show for rows in each for name, row in rows.items()}
    return {
        name: ([rows[name].sliced if name in rows else None for rows in each], show)
        for name, show in shows.items()
    }


def _rows(report: Report) -> list[Row]:
    rows = [row for row in (*report.costs(), *report.losses()) if not row.part]
    return [*rows, Row("seconds", None, sum(report.seconds.values()), rate)]


def layers(sides: Sequence[Side]) -> dict[str, dict[str, list[int | None]]]:
    """Kind → space → its width in every report, those spaces that not all have alike."""
    found: dict[str, dict[str, list[int | None]]] = {}
    each = [side.report.widths for side in sides]
    for name in sorted(dict.fromkeys(n for widths in each for n in widths), key=order):
        kept = [widths.get(name) for widths in each]
        if len(set(kept)) > 1:
            owner = next(s.report for s in sides if name in s.report.widths)
            found.setdefault(sentences.kind_of(owner, name), {})[name] = kept
    return found


def energy(sides: Sequence[Side]) -> Blocks:
    """Of every report, the share of its bases' energy that is cut; kinds of which some is."""
    found: Blocks = {}
    for side in sides:
        for kind, spaces in sentences.spaces(side.report).items():
            widths = {w.name: w.kept for w in spaces}
            whole = {name: 0.0 for name, e in side.spectra.items() if widths.get(name) == len(e)}
            cut = {n: v for n, v in energy_lost(side.spectra, widths).items() if math.isfinite(v)}
            found.setdefault(kind, {s.name: [] for s in sides})[side.name] = by_block(whole | cut)
    cut_somewhere = {
        k: any(v for values in each.values() for v in values) for k, each in found.items()
    }
    return {kind: each for kind, each in found.items() if cut_somewhere[kind]}


def samples(sides: Sequence[Side]) -> dict[str, dict[str, str]]:
    """Prompt → side → its text, for prompts that two sides have or more; beside them the first dense model's."""
    found: dict[str, dict[str, str]] = {}
    for side in sides:
        for sample in side.report.samples:
            texts = found.setdefault(sample.prompt, {DENSE: sample.dense or NONE})
            texts[side.name] = next((t for s in WRITTEN if (t := getattr(sample, s))), NONE)
    return {prompt: texts for prompt, texts in found.items() if len(texts) > 2}


def document(sides: Sequence[Side]) -> dict[str, Any]:
    """The comparison as plain data."""
    return {
        "runs": [side.name for side in sides],
        "numbers": {name: values for name, (values, _) in numbers(sides).items()},
        "widths": layers(sides),
        "energy_cut": {kind: list(each.values()) for kind, each in energy(sides).items()},
        "samples": samples(sides),
    }


def grids(sides: Sequence[Side]) -> list[Grid]:
    """Numbers, widths that differ, and energies that are cut, as tables."""
    names = [side.name for side in sides]
    found = [
        Grid("Numbers; ratios are to the first.", ["", *names], _number_rows(sides)),
        *(_widths_grid(kind, spaces, names) for kind, spaces in layers(sides).items()),
    ]
    means = []
    for kind, each in energy(sides).items():
        known = [[v for v in values if v is not None] for values in each.values()]
        means.append([kind_words(kind), *(f"{fmean(k):.2%}" if k else NONE for k in known)])
    said = "Energy of a run's own bases that is cut, mean over blocks."
    return [*found, *([Grid(said, ["", *names], means)] if means else [])]


def _number_rows(sides: Sequence[Side]) -> list[list[str]]:
    rows = []
    for name, (values, show) in numbers(sides).items():
        top, first = max((v for v in values if v is not None), default=None), values[0]
        others = [f"{show(v, top)}  {ratio(first, v)}" for v in values[1:]]
        rows.append([name, show(first, top), *others])
    return rows


def _widths_grid(kind: str, spaces: dict[str, list[int | None]], names: list[str]) -> Grid:
    rows = [[n, *(NONE if k is None else str(k) for k in kept)] for n, kept in spaces.items()]
    return Grid(f"Widths that differ: {kind_words(kind)}.", ["space", *names], folded(rows))


def tables(sides: Sequence[Side]) -> list[Any]:
    """The comparison for the terminal."""
    return [grid.table() for grid in (*grids(sides), *_texts(sides))]


def _texts(sides: Sequence[Side]) -> list[Grid]:
    return [
        Grid(prompt, list(found), [[text.strip() for text in found.values()]], 9, True)
        for prompt, found in samples(sides).items()
    ]


def latex(sides: Sequence[Side]) -> Grid:
    """Costs and perplexities for a paper, a line a run; ± is one standard error over windows of the perplexity."""
    shown = {name: values for name, values in numbers(sides).items() if name != "seconds"}
    rows = []
    for n, side in enumerate(sides):
        cells = []
        for name, (values, show) in shown.items():
            top = max((v for v in values if v is not None), default=None)
            cells.append(show(values[n], top) + within(_error(side.report, name), 2))
        rows.append([side.name, *cells])
    said = "Perplexities are followed by one standard error over windows, against the dense model."
    return Grid(f"Costs and perplexities. {said}", ["run", *shown], rows)


def _error(report: Report, name: str) -> float | None:
    """The standard error of a perplexity, p ≈ exp(loss): p times that of the loss."""
    for data, found in report.perplexity.items():
        for end, side in (
            ("", "sliced"),
            (", recovered", "recovered"),
            (", quantised", "quantized"),
        ):
            value, error = getattr(found, side), found.extra_loss.get(side, Mean()).standard_error
            if name == f"perplexity, {data}{end}" and value is not None and error is not None:
                return value * error
    return None


def figures(sides: Sequence[Side]) -> list[Drawing]:
    """Widths that differ and energies cut, by block, a line a run."""
    found = []
    for kind in layers(sides):
        every = {s.name: sentences.spaces(s.report).get(kind, []) for s in sides}
        each = {
            n: by_block({w.name: w.kept / max(w.dim, 1) for w in ws}) for n, ws in every.items()
        }
        title = f"Widths of the {kind_words(kind)}"
        said = "share of each block's width that is kept"
        found.append(plots.layers(f"widths-{kind}", title, said, each, 1.0))
    for kind, lost in energy(sides).items():
        title = f"Energy cut: {kind_words(kind)}"
        said = "share of each block's energy, as the run's own basis counts it, that is cut"
        found.append(plots.layers(f"energy-{kind}", title, said, lost, 0.0))
    return found


def page(sides: Sequence[Side]) -> str:
    """The comparison as one HTML page that loads nothing."""
    numbers, *rest = grids(sides)
    drawn, texts = figures(sides), _texts(sides)
    return pages.page(
        "compare",
        title="Comparison · invariance",
        kicker="Comparison · invariance",
        heading=" · ".join(side.name for side in sides),
        lead=[],
        sections=[
            Section("Numbers", grids=[numbers]),
            Section("Layer by layer", grids=rest, drawings=drawn, missing="No widths differ."),
            *([Section("Samples", grids=texts)] if texts else []),
        ],
    )
