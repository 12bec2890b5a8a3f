"""A run's report in words: its numbers in fit units, dense against sliced, and sentences on what they mean."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

NONE = "–"
KINDS = {
    "residual": "residual stream",
    "mlp": "MLP",
    "vo": "value/output heads",
    "qk": "query/key heads",
    "heads": "KV groups",
    "edge": "matrices in two factors",
}

Report = Mapping[str, Any]  # what report.json holds


# --- Numbers in words.


def ratio(dense: float | None, sliced: float | None) -> str:
    if not dense or sliced is None:
        return NONE
    times = sliced / dense
    return (
        f"{times:,.0f}×" if times >= 100 else f"{times:.2f}×" if times >= 0.01 else f"{times:.1e}×"
    )


def count(value: float | None, largest: float | None = None) -> str:
    """A count in the unit that suits ``largest``, so that a table's numbers stand in one unit."""
    if value is None:
        return NONE
    top = abs(value if largest is None else largest)
    for least, size, unit, digits in ((1e10, 1e9, "B", 2), (1e6, 1e6, "M", 1), (1e4, 1e3, "k", 1)):
        if top >= least and round(value / size, digits):
            return f"{value / size:,.{digits}f}{unit}"
    return f"{value:,.0f}"


def size(value: float | None, largest: float | None = None) -> str:
    if value is None:
        return NONE
    power = min(int(math.log2(max(value if largest is None else largest, 1)) // 10), 4)
    return f"{value / 1024**power:,.{1 if power else 0}f}\xa0{('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def plain(value: float | None, largest: float | None = None) -> str:
    if value is None:
        return NONE
    return f"{value:,.2f}" if abs(value) < 1e5 else f"{value:.2e}"


def whole(value: float | None, largest: float | None = None) -> str:
    return NONE if value is None else f"{value:,.0f}"


def rate(value: float | None, largest: float | None = None) -> str:
    return NONE if value is None else f"{value:,.{0 if value >= 100 else 1}f}"


def milliseconds(value: float | None, largest: float | None = None) -> str:
    return NONE if value is None else f"{1e3 * value:,.1f}\xa0ms"


def error(value: float | None) -> str:
    return (
        NONE
        if value is None
        else "0"
        if value == 0
        else f"{value:.1e}"
        if abs(value) < 0.01
        else f"{value:.2f}"
    )


# --- Facts that page and terminal share.


@dataclass(frozen=True)
class Width:
    """How much of one space is kept."""

    name: str
    block: int
    kept: int
    dim: int


@dataclass(frozen=True)
class Row:
    """One quantity of the dense and of the sliced model."""

    name: str
    dense: float | None
    sliced: float | None
    show: Callable[[float | None, float | None], str]
    largest: float | None = None
    part: bool = False
    recovered: float | None = None

    @property
    def cells(self) -> list[str]:
        top = self.largest or max(
            (v for v in (self.dense, self.sliced) if v is not None), default=None
        )
        values = (self.dense, self.sliced)
        return [self.name, *(self.show(v, top) for v in values), ratio(*values)]


def _both(report: Report, key: str) -> tuple[Any, Any]:
    found = report.get(key) or {}
    return found.get("dense"), found.get("sliced")


def parameters(report: Report) -> list[Row]:
    dense, sliced = (found or {} for found in _both(report, "parameters"))
    top = max([dense.get("total") or 0, sliced.get("total") or 0]) or None
    rows = [Row("parameters", dense.get("total"), sliced.get("total"), count, top)]
    parts = ("embedding", "blocks", "shortcuts", "head")
    return rows + [Row(p, dense.get(p), sliced.get(p), count, top, part=True) for p in parts]


def blocks(report: Report) -> Row:
    """Blocks and shortcuts together: what slicing pays for and with."""
    found = [None if not p else p["blocks"] + p["shortcuts"] for p in _both(report, "parameters")]
    return Row("blocks + shortcuts", found[0], found[1], count)


def costs(report: Report) -> list[Row]:
    timed = _both(report, "predicted_seconds")
    return [
        Row("FLOPs per token", *_both(report, "flops_per_token"), count),
        Row("KV cache per token", *_both(report, "kv_bytes_per_token"), size),
        *([Row("predicted latency", *timed, milliseconds)] if timed[0] else []),
    ]


def speed(report: Report) -> Row:
    return Row("tokens per second", *_both(report, "tokens_per_second"), rate)


def perplexities(report: Report) -> list[Row]:
    found = (report.get("perplexity") or {}).items()
    return [
        Row(
            f"perplexity, {name}",
            p.get("dense"),
            p.get("sliced"),
            plain,
            recovered=p.get("recovered"),
        )
        for name, p in found
    ]


FORETOLD = {
    "selector": " by the selector, when it chose the widths",
    "energies": " by the energies that are cut",
    "gradients": " to second order, by gradients of the dense model",
}


def predicted(report: Report) -> list[str]:
    """What was predicted before anything was measured: the loss, where one was, and what share of the spectra is cut."""
    found = report.get("predicted") or {}
    said = []
    if found.get("loss") is not None:
        measured = found.get("measured")
        beside = (
            "" if measured is None else f"; measured, on the first of these data: {measured:+.3f}"
        )
        said.append(
            f"Predicted{FORETOLD.get(str(found.get('by')), '')}: {found['loss']:+.3f} nats per token{beside}."
        )
    if found.get("energy"):
        shares = ", ".join(f"{share:.2%} of {kind}" for kind, share in found["energy"].items())
        said.append(
            f"Energy in the directions that are cut, before anything makes up for it: {shares}."
        )
    return said


def exactness(report: Report) -> str:
    """One sentence on what the certificate shows."""
    found = report.get("exactness")
    if not found:
        return "The exactness of the changes of basis was not measured."
    moved, limit = error(found["relative_error"]), error(found["tolerance"])
    done = f"With new bases in {found['spaces']} spaces and nothing cut, logits moved by {moved}, relative, in float64"
    if found["relative_error"] > found["tolerance"]:
        return f"{done}. Rounding alone explains only {limit}: the rotated model computes something else."
    control = f"half of a change moves them by {error(found['negative_control'])}"
    if not found["passed"]:
        return f"{done}, within {limit}; but as a control, {control}: too little for the test to mean anything."
    return f"{done}: within the {limit} that rounding alone explains. As a control, {control}."


def order(name: str) -> list[int]:
    """A space's place in depth."""
    return [int(n) for n in re.findall(r"\d+", name)] or [0]


def block(name: str) -> int:
    return order(name)[0]


def kind_of(report: Report, name: str) -> str:
    return (report.get("kinds") or {}).get(name, name.split(".")[0])


def kind_words(kind: str) -> str:
    return KINDS.get(kind, kind)


def spaces(report: Report) -> dict[str, list[Width]]:
    """The widths by kind, from first to last."""
    found: dict[str, list[Width]] = {kind: [] for kind in KINDS}
    for name, kept in sorted((report.get("widths") or {}).items(), key=lambda item: order(item[0])):
        dim = (report.get("dims") or {}).get(name, kept)
        found.setdefault(kind_of(report, name), []).append(Width(name, block(name), kept, dim))
    return {kind: widths for kind, widths in found.items() if widths}


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return (
        str(low) if low == high else f"{low} to {high} ({sum(values) / len(values):.0f} on average)"
    )


def width_words(widths: Sequence[Width]) -> str:
    kept, dims = _range([w.kept for w in widths]), _range([w.dim for w in widths])
    return f"{kept} of {dims} in {len(widths)} space{'s' * (len(widths) > 1)}"


def best(trained: Mapping[str, Any]) -> str:
    best, steps = trained["best_step"], trained["steps"]
    losses = {p["step"]: p["held_out_loss"] for p in trained["curve"]}
    lost = [step for step, loss in losses.items() if loss is None or not math.isfinite(loss)]
    said = (
        f"the best was after step {best} of {steps}"
        if best
        else f"none of {steps} steps was better"
    )
    return f"{said}; TRAINING DIVERGED by step {lost[0]}, lower `learning_rate`" if lost else said


def summary(report: Report) -> str:
    """The run in one paragraph."""
    model, total = report["model"], parameters(report)[0]
    _, dense, sliced, part = total.cells
    said = [
        f"{model['name']} ({model['family']}) went from {dense} to {sliced} stored parameters ({part})."
    ]
    found = spaces(report).items()
    cut = [
        f"{width_words(w)} ({kind_words(kind)})"
        for kind, w in found
        if any(s.kept < s.dim for s in w)
    ]
    said.append(f"Directions kept: {'; '.join(cut)}." if cut else "Nothing was cut.")
    for name, row in zip(report.get("perplexity") or {}, perplexities(report)[:3], strict=False):
        steps = [] if row.recovered is None else [f"to {plain(row.recovered)} after recovery"]
        if (
            row.sliced is not None or not steps
        ):  # that of a family's member is known after recovery alone
            steps.insert(0, f"to {row.cells[2]} ({row.cells[3]})")
        said.append(f"Perplexity on {name} went from {row.cells[1]} {', and '.join(steps)}.")
    if trained := report.get("recover"):
        said.append(
            f"Recovery trained {count(trained['trained_parameters'])} parameters ({trained['weights']}) on "
            f"{count(trained['tokens'])} tokens; {best(trained)}."
        )
    if (report.get("exactness") or {}).get("passed"):
        moved = error(report["exactness"]["relative_error"])
        said.append(f"Before the cut, the changes of basis were certified exact, to {moved}.")
    return " ".join(said)


def commands(report: Report, output: str = "again", recipe: str = "recipe.yaml") -> list[str]:
    """What makes the result once more: a run, and of a nested family's member its extraction."""
    made = [["invariance", "run", recipe, "--output", output]]
    if (share := report.get("member")) is not None:
        made.append(
            [
                "invariance",
                "extract",
                output,
                "--width",
                f"{share:g}",
                "--output",
                f"{output}-{share:g}",
            ]
        )
    return [shlex.join(words) for words in made]


def checkpoint(report: Report) -> str:
    """Who can load the result."""
    model = report["model"]
    if model["stock"]:
        return f"The result is an ordinary '{model['exported_as']}' checkpoint: plain transformers loads it."
    why = (
        f" No stock config holds it: {model['why_not_stock']}."
        if model.get("why_not_stock")
        else ""
    )
    return f"AutoModelForCausalLM loads the result once invariance is imported.{why}"
