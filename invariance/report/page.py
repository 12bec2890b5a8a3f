"""What a run's report shows: one HTML page that loads nothing, its figures, and tables for the terminal."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING, Any

from ruamel.yaml import YAML

from . import evaluations, pages, plots, sentences
from .document import Report
from .grid import Grid
from .pages import Section
from .plots import Point, Spectrum
from .reading import Spectra
from .sentences import kind_words
from .units import NONE, block, capital, error, order, size

if TYPE_CHECKING:
    from rich.console import Group

    from .figures import Drawing

COLUMNS = ("", "dense", "sliced", "ratio")
NOTE = "Parameters are those stored, a tied tensor counted once. FLOPs leave out attention scores and norms."
PEAKS = (
    "max/RMS is 1 where all numbers of a run are alike in size, and the root of its length where one holds all; the "
    "kurtosis of Gaussian numbers is 3. Weights are rounded here, and activations are not."
)
SHARES = (
    "The part of its basis's energy that each direction holds, and that is lost if it goes; heads are summed. Dark: the "
    "first block; light: the last."
)


def page(report: Report, spectra: Spectra, drawn: list[Drawing] | None = None) -> str:
    """One HTML file that holds everything it shows; ``drawn`` are its figures, where they are there already."""
    output = report.output or "output"
    facts = [("Peak memory", size(report.peak_memory_bytes)), *report.versions.items()]
    return pages.page(
        "report",
        title=f"{report.model.name} · invariance",
        kicker=f"Compression report · invariance {report.version}",
        heading=report.model.name,
        lead=[sentences.summary(report), sentences.checkpoint(report.model, report)],
        tiles=_tiles(report),
        sections=_sections(report, figures(report, spectra) if drawn is None else drawn),
        facts=facts,
        command="\n".join(sentences.commands(report, f"{output}-again", f"{output}/recipe.yaml")),
        recipe=yaml_text(report.recipe),
    )


def _tiles(report: Report) -> list[tuple[str, str, str]]:
    """What matters most, in large letters."""
    chosen = ("parameters", "blocks + shortcuts", "tokens per second")
    rows = [row for row in report.costs() if row.name in chosen]
    rows[2:2] = report.losses()[:1]
    tiles = []
    for name, dense, sliced, ratio in (row.cells for row in rows):
        tiles.append((capital(name.split(",")[0]), ratio, f"{dense} → {sliced}"))
    found = report.exactness
    verdict = NONE if found is None else "certified" if found.passed else "failed"
    return [
        *tiles,
        ("Exactness", verdict, f"error {error(None if found is None else found.relative_error)}"),
    ]


def _sections(report: Report, drawn: list[Drawing]) -> list[Section]:
    def of(name: str) -> list[Drawing]:
        return [d for d in drawn if d.name.startswith(name)]

    trained, found = report.recover, report.exactness
    tokens = [g for n, each in report.divergence.items() for g in evaluations.divergence(n, each)]
    verdict = None if found is None else ("passed", "good") if found.passed else ("failed", "bad")
    rounded = [Grid(PEAKS, COLUMNS, [row.cells for row in report.outliers()])]
    whole = [
        f"{kind_words(kind)}: {sentences.width_words(spaces)}"
        for kind, spaces in sentences.spaces(report).items()
        if all(w.kept == w.dim for w in spaces)
    ]
    left = [f"Left whole: {'; '.join(whole)}."] if whole else []
    asked = [
        Section("Size and cost", grids=[Grid(NOTE, COLUMNS, [r.cells for r in report.costs()])]),
        Section("Nested members", grids=evaluations.members(report)),
        Section(
            "Perplexity",
            sentences.predicted(report),
            [*evaluations.perplexity(report), *evaluations.texts(report.texts)],
            missing="This run has no evaluation.",
        ),
        Section(
            "Recovery",
            [] if trained is None else [sentences.recovery(trained)],
            drawings=of("recovery"),
        ),
        Section("Predictions, token by token", grids=tokens),
        Section("Tasks", grids=evaluations.tasks(report)),
        Section("Quantisation and outliers", grids=rounded if report.quantize else []),
        Section(
            "Exactness",
            [] if found is None else [sentences.exactness(report)],
            drawings=of("exactness"),
            missing="This run has no certificate.",
            badge=verdict,
        ),
        Section("Data", grids=evaluations.data(report)),
        Section("Widths kept", left, drawings=of("widths"), missing="Nothing was cut."),
        Section("Spectra", [SHARES], drawings=of("spectra"), missing="This run has no spectra."),
        Section(
            "Samples", grids=evaluations.samples(report), missing="This run has no continuations."
        ),
        Section("Time", grids=_steps(report), missing="This run has no timings."),
    ]
    return [s for s in asked if s.texts or s.grids or s.drawings or s.missing]


def _steps(report: Report) -> list[Grid]:
    whole = sum(report.seconds.values())
    rows = [[capital(n), f"{s:,.1f}", f"{s / (whole or 1):.0%}"] for n, s in report.seconds.items()]
    rows.append(["All steps", f"{whole:,.1f}", ""])
    return [Grid("Seconds by step.", ["step", "seconds", "share"], rows)] if report.seconds else []


def figures(report: Report, spectra: Spectra) -> list[Drawing]:
    """Everything that the page draws, to write as files too."""
    found = []
    if (e := report.exactness) is not None:
        names = {
            "rotated model": e.relative_error,
            "what rounding explains": e.tolerance,
            "control: half of a change": math.nan
            if e.negative_control is None
            else e.negative_control,
        }
        found.append(plots.errors("exactness", "Errors of the certificate", names, e.tolerance))
    checks = report.recover.curve if report.recover is not None else []
    losses = [
        Point(c.step, c.held_out_loss)
        for c in checks
        if c.held_out_loss is not None and math.isfinite(c.held_out_loss)
    ]
    if losses:
        labels = ("step", "nats per token")
        title = "Held-out loss over the steps of training"
        found.append(plots.curves("recovery", title, "", {"held-out loss": losses}, labels))
    for kind, spaces in sentences.spaces(report).items():
        if any(w.kept < w.dim for w in spaces):
            said, title = sentences.width_words(spaces), f"Widths of the {kind_words(kind)}"
            found.append(plots.widths(f"widths-{kind}", title, said, spaces))
    return found + _spectra(report, spectra)


def _spectra(report: Report, spectra: Spectra) -> list[Drawing]:
    last = max((block(name) for name in (*spectra, *report.widths)), default=0)
    kinds: dict[str, list[Spectrum]] = {kind: [] for kind in sentences.KINDS}
    for name in sorted(spectra, key=order):
        if energies := spectra[name]:
            kept = report.widths.get(name, len(energies))
            each = Spectrum(name, block(name) / max(last, 1), energies, kept)
            kinds.setdefault(sentences.kind_of(report, name), []).append(each)
    found = []
    for kind, bases in kinds.items():
        if bases:
            said = "one basis" if len(bases) == 1 else f"{len(bases)} bases"
            if len({c.kept for c in bases if c.kept < len(c.energies)}) > 1:
                said += ", each cut at its dot"
            title = f"Spectra of the {kind_words(kind)}"
            found.append(plots.spectra(f"spectra-{kind}", title, said, bases))
    return found


def table(report: Report) -> Group:
    """What matters most, for the terminal."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    rows = [row.cells for row in (*report.costs(), *report.losses(), *report.outliers())]
    parts: list[Any] = [
        Grid("", COLUMNS, rows).table(),
        Text(" ".join([*sentences.rounded(report), sentences.exactness(report)])),
    ]
    more = [
        *evaluations.data(report),
        *evaluations.texts(report.texts),
        *evaluations.members(report),
    ]
    parts += [grid.table() for grid in (*more, *evaluations.tasks(report))]
    parts += [Padding(grid.table(), (1, 0)) for grid in evaluations.samples(report)]
    if output := report.output:
        said = f"checkpoint  {output}/model\nreport      {output}/report.html"
        parts.append(Text(said, overflow="fold"))
    return Group(*parts)


def yaml_text(value: Any) -> str:
    """Plain data as YAML, keys in their order."""
    yaml, stream = YAML(typ="safe", pure=True), io.StringIO()
    yaml.default_flow_style, yaml.width = False, 4096
    yaml.representer.sort_base_mapping_type_on_output = False
    yaml.dump(value, stream)
    return stream.getvalue()
