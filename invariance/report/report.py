"""What a run's report shows: one HTML page that loads nothing, and tables for the terminal."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from xml.etree.ElementTree import Element

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from ruamel.yaml import YAML

from . import charts, evaluate_words, quantize_words, text_words, words
from .charts import el
from .study_charts import Series, curves
from .words import NONE, Report

Spectra = Mapping[str, Sequence[float]]  # a unit's first space → its energies, falling


def page(report: Report, spectra: Spectra) -> str:
    """One HTML file that holds everything it shows."""
    sections = (
        _sizes,
        _members,
        _perplexity,
        _recovery,
        _evaluations,
        _quantisation,
        _exactness,
        _widths,
    )
    body = [*_head(report), *(part for section in sections for part in section(report))]
    body += [*_spectra(report, spectra), *_samples(report), *_run(report), *_recipe(report)]
    return charts.document(f"{report['model']['name']} · invariance", *body)


def _missing(what: str) -> Element:
    return el("p", f"This run has no {what}.", class_="soft")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _facts(pairs: Iterable[tuple[str, str]]) -> Element:
    return el(
        "dl",
        *(el(tag, text) for pair in pairs for tag, text in zip(("dt", "dd"), pair, strict=True)),
        class_="facts",
    )


def _head(report: Report) -> list[Element]:
    rows = [
        words.parameters(report)[0],
        words.blocks(report),
        *words.perplexities(report)[:1],
        words.speed(report),
    ]
    tiles = [
        (_capital(row.name.split(",")[0]), row.cells[3], f"{row.cells[1]} → {row.cells[2]}")
        for row in rows
    ]
    found = report.get("exactness") or {}
    verdict = NONE if not found else "certified" if found["passed"] else "failed"
    tiles.append(("Exactness", verdict, f"error {words.error(found.get('relative_error'))}"))
    return [
        el("p", f"Compression report · invariance {report['version']}", class_="soft"),
        el("h1", str(report["model"]["name"])),
        el("p", " ".join([words.summary(report), *quantize_words.summary(report)])),
        el("p", words.checkpoint(report) + quantize_words.checkpoint(report), class_="soft"),
        el(
            "dl",
            *(el("div", el("dt", a), el("dd", b), el("dd", c)) for a, b, c in tiles),
            class_="tiles",
        ),
    ]


def _sizes(report: Report) -> list[Element]:
    rows: list[Sequence[Element | str]] = []
    for row in [
        *words.parameters(report),
        *words.costs(report),
        words.speed(report),
        *quantize_words.sizes(report),
    ]:
        name, *cells = row.cells
        rows.append(
            [el("span", _capital(name), class_="part") if row.part else _capital(name), *cells]
        )
    note = "Parameters are those stored, a tied tensor counted once. FLOPs leave out attention scores and norms."
    return [
        el("h2", "Size and cost"),
        charts.table(note, ["What", "Dense", "Sliced", "Ratio"], rows),
    ]


def _members(report: Report) -> list[Element]:
    found = [g.element() for g in evaluate_words.members(report)]
    return [el("h2", "Nested members"), *found] if found else []


def _perplexity(report: Report) -> list[Element]:
    found, heading = words.perplexities(report), el("h2", "Perplexity")
    if not found:
        return [heading, _missing("evaluation")]
    recovered = any(row.recovered is not None for row in found)
    columns = ["Data", "Dense", "Sliced", "Ratio", *(["Recovered", "Ratio"] if recovered else [])]
    rows: list[Sequence[Element | str]] = []
    for key, row, beneath in zip(
        report["perplexity"], found, quantize_words.perplexities(report), strict=True
    ):
        after = (
            [words.plain(row.recovered), words.ratio(row.dense, row.recovered)] if recovered else []
        )
        tokens = el("span", evaluate_words.windows(report["perplexity"][key]), class_="part")
        rows.append([el("span", key, tokens), *row.cells[1:], *after])
        if beneath is not None:
            name, *cells = beneath.cells
            rows.append([el("span", _capital(name), class_="part"), *cells, *([NONE] * len(after))])
    return [
        heading,
        charts.table("exp of the mean next-token cross-entropy; lower is better.", columns, rows),
        *(el("p", said) for said in words.predicted(report)),
    ]


def _recovery(report: Report) -> list[Element]:
    trained = report.get("recover") or {}
    if not (points := trained.get("curve")):
        return []
    nats = [
        (float(p["step"]), loss, loss, loss)
        for p in points
        if math.isfinite(loss := p["held_out_loss"])
    ]
    held, title = trained["held_out"], "Held-out loss over the steps of training"
    said = (
        f"Nats per token on {held['tokens']:,} tokens of the training text that were held out: perplexity "
        f"{words.plain(held['before'])} before, {words.plain(held['after'])} after; {trained['tokens_per_second']:,.0f} "
        "tokens a second."
    )
    drawn = curves(title, [Series("held-out loss", charts.shade(1.0), nats)], "steps")
    return [el("h2", "Recovery"), el("p", said), el("figure", drawn, class_="narrow")]


def _evaluations(report: Report) -> list[Element]:
    found = [
        g
        for name, each in (report.get("divergence") or {}).items()
        for g in evaluate_words.divergence(name, each)
    ]
    parts = (
        [el("h2", "Predictions, token by token"), *(g.element() for g in found)] if found else []
    )
    tasks = evaluate_words.tasks(report) if report.get("tasks") else []
    return parts + ([el("h2", "Tasks"), *(g.element() for g in tasks)] if tasks else [])


def _quantisation(report: Report) -> list[Element]:
    found: list[Sequence[Element | str]] = [row.cells for row in quantize_words.outliers(report)]
    if not found:
        return []
    note = (
        "max/RMS is 1 where all numbers of a run are alike in size, and the root of its length where one holds all; the "
        "kurtosis of Gaussian numbers is 3. Weights are rounded here, and activations are not."
    )
    table = charts.table(note, ["What", "Dense", "Sliced", "Ratio"], found)
    return [el("h2", "Quantisation and outliers"), table]


def _exactness(report: Report) -> list[Element]:
    found = report.get("exactness")
    if not found:
        return [el("h2", "Exactness"), _missing("certificate")]
    verdict, class_ = ("passed", "badge good") if found["passed"] else ("failed", "badge bad")
    names = {
        "error of the rotated model": "relative_error",
        "tolerance: what rounding alone explains": "tolerance",
        "control: half of a change": "negative_control",
    }
    errors = {name: (words.error(found[key]), found[key]) for name, key in names.items()}
    said = "; ".join(f"{name} {text}" for name, (text, _) in errors.items())
    drawn = charts.errors_chart(
        "Relative logit errors on a logarithmic scale", said, errors, found["tolerance"]
    )
    return [
        el("h2", "Exactness ", el("span", verdict, class_=class_)),
        el("p", words.exactness(report)),
        el("figure", drawn, class_="narrow"),
    ]


def _figure(kind: str, caption: str, chart: Element) -> Element:
    return el(
        "figure",
        el("figcaption", el("b", _capital(words.kind_words(kind))), f" · {caption}"),
        chart,
    )


def _widths(report: Report) -> list[Element]:
    figures = []
    for kind, spaces in words.spaces(report).items():
        said = words.width_words(spaces)
        title = f"Widths of the {words.kind_words(kind)} over depth"
        figures.append(_figure(kind, said, charts.widths_chart(title, said, spaces)))
    body = el("div", *figures, class_="charts") if figures else _missing("widths")
    return [el("h2", "Widths kept"), body]


def _spectra(report: Report, spectra: Spectra) -> list[Element]:
    widths = report.get("widths") or {}
    last = max((words.block(name) for name in (*spectra, *widths)), default=0)
    curves: dict[str, list[charts.Curve]] = {kind: [] for kind in words.KINDS}
    for name in sorted(spectra, key=words.order):
        energies = spectra[name]
        if len(energies):
            style = charts.shade(words.block(name) / max(last, 1))
            curve = charts.Curve(name, style, energies, widths.get(name, len(energies)))
            curves.setdefault(words.kind_of(report, name), []).append(curve)
    figures = []
    for kind, found in curves.items():
        if found:
            said = "one basis" if len(found) == 1 else f"{len(found)} bases"
            if len({c.kept for c in found if c.kept < len(c.energies)}) > 1:
                said += ", each cut at its dot"
            title = f"Spectra of the {words.kind_words(kind)}"
            cuts = "; ".join(f"{c.name} keeps {c.kept} of {len(c.energies)}" for c in found)
            figures.append(
                _figure(kind, said, charts.spectra_chart(title, f"Falling energies. {cuts}", found))
            )
    if not figures:
        return [el("h2", "Spectra"), _missing("spectra")]
    said = "The part of its basis's energy that each direction holds, and that is lost if it goes; heads are summed."
    grid = el("div", *figures, class_="charts")
    return [el("h2", "Spectra"), el("p", said), charts.ramp("first block", "last block"), grid]


def _samples(report: Report) -> list[Element]:
    found = []
    for sample in report.get("samples") or []:
        texts = [
            el(
                "div",
                el("h3", _capital(evaluate_words.SIDES[side])),
                el("p", (sample[side] or NONE).strip()),
            )
            for side in evaluate_words.sides_of(sample)
        ]
        class_ = "sample three" if len(texts) == 3 else "sample"
        found.append(el("div", el("p", el("b", sample["prompt"])), *texts, class_=class_))
    return [el("h2", "Samples"), *(found or [_missing("sample continuations")])]


def _run(report: Report) -> list[Element]:
    seconds = report.get("seconds") or {}
    longest = max(seconds.values(), default=0) or 1
    rows: list[Sequence[Element | str]] = [
        [_capital(step), f"{s:,.1f}", charts.bar(s / longest)] for step, s in seconds.items()
    ]
    columns = ["Step", "Seconds", "Of the longest"]
    table = charts.table("Time per step.", columns, rows, "bars") if rows else _missing("timings")
    whole = f"{sum(seconds.values()):,.1f} s" if seconds else NONE
    facts = [("All steps", whole), ("Peak memory", words.size(report.get("peak_memory_bytes")))]
    facts += [(name, str(version)) for name, version in (report.get("versions") or {}).items()]
    return [el("h2", "The run"), table, _facts(facts)]


def _recipe(report: Report) -> list[Element]:
    yaml, stream = YAML(typ="safe", pure=True), io.StringIO()
    yaml.default_flow_style, yaml.width = False, 4096
    yaml.representer.sort_base_mapping_type_on_output = False
    yaml.dump(report["recipe"], stream)
    output = str(report["output"] or "output")
    command = "\n".join(words.commands(report, f"{output}-again", f"{output}/recipe.yaml"))
    return [
        el("h2", "Run it again"),
        el("p", "recipe.yaml lies beside this page, and below, with every default written out."),
        el("pre", command, tabindex=0),
        el(
            "details", el("summary", "The recipe in full"), el("pre", stream.getvalue(), tabindex=0)
        ),
    ]


def table(report: Report) -> Group:
    """What matters most, for the terminal."""
    sizes = Table("", "dense", "sliced", "ratio")
    for column in sizes.columns[1:]:
        column.justify = "right"

    def add(row: words.Row) -> None:
        name, *cells = row.cells
        sizes.add_row(*(Text(cell) for cell in (f"  {name}" if row.part else name, *cells)))

    for row in [words.parameters(report)[0], words.blocks(report), *quantize_words.sizes(report)]:
        add(row)
    for row, beneath in zip(
        words.perplexities(report), quantize_words.perplexities(report), strict=True
    ):
        add(row)
        if row.recovered is not None:
            after = (words.plain(row.recovered), words.ratio(row.dense, row.recovered))
            sizes.add_row(*(Text(cell) for cell in ("  after recovery", row.cells[1], *after)))
        if beneath is not None:
            add(beneath)
    for row in [words.speed(report), *quantize_words.outliers(report)]:
        add(row)
    parts: list[RenderableType] = [sizes, Text(words.exactness(report))]
    parts += [g.table() for g in [*text_words.texts(report), *evaluate_words.members(report)]]
    if report.get("tasks"):
        parts += [g.table() for g in evaluate_words.tasks(report)]
    parts += [Padding(texts, (1, 0)) for texts in evaluate_words.samples(report)]
    if output := report["output"]:
        parts.append(
            Text(f"checkpoint  {output}/model\nreport      {output}/report.html", overflow="fold")
        )
    return Group(*parts)
