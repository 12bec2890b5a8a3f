"""A run's report in sentences: what it went from and to, who loads the result, what the certificate shows."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence

from .document import Model, Report, Trained
from .plots import Width
from .units import NONE, block, count, error, order, plain, rate, ratio, size

KINDS = {
    "residual": "residual stream",
    "mlp": "MLP",
    "vo": "value/output heads",
    "qk": "query/key heads",
    "heads": "KV groups",
    "edge": "matrices in two factors",
    "experts": "experts",
}
FORETOLD = {
    "selector": " by the selector, when it chose the widths",
    "energies": " by the energies that are cut",
    "gradients": " to second order, by gradients of the dense model",
}


def kind_of(report: Report, name: str) -> str:
    return report.kinds.get(name, name.split(".")[0])


def kind_words(kind: str) -> str:
    return KINDS.get(kind, kind)


def spaces(report: Report) -> dict[str, list[Width]]:
    """The widths by kind, from first to last."""
    found: dict[str, list[Width]] = {kind: [] for kind in KINDS}
    for name, kept in sorted(report.widths.items(), key=lambda item: order(item[0])):
        width = Width(name, block(name), kept, report.dims.get(name, kept))
        found.setdefault(kind_of(report, name), []).append(width)
    return {kind: widths for kind, widths in found.items() if widths}


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    mean = sum(values) / len(values)
    return str(low) if low == high else f"{low} to {high} ({mean:.0f} on average)"


def width_words(widths: Sequence[Width]) -> str:
    kept, dims = _range([w.kept for w in widths]), _range([w.dim for w in widths])
    return f"{kept} of {dims} in {len(widths)} space{'s' * (len(widths) > 1)}"


def predicted(report: Report) -> list[str]:
    """What was predicted before anything was measured: the loss, and what share of the spectra is cut."""
    found, said = report.predicted, []
    if found.loss is not None:
        m = found.measured
        beside = "" if m is None else f"; measured, on the first of these data: {m:+.3f}"
        by = FORETOLD.get(str(found.by), "")
        said.append(f"Predicted{by}: {found.loss:+.3f} nats per token{beside}.")
    if found.energy:
        shares = (f"{NONE if s is None else f'{s:.2%}'} of {k}" for k, s in found.energy.items())
        told = "Energy in the directions that are cut, before anything makes up for it"
        said.append(f"{told}: {', '.join(shares)}.")
    return said


def exactness(report: Report) -> str:
    """One sentence on what the certificate shows."""
    if (found := report.exactness) is None:
        return "The exactness of the changes of basis was not measured."
    moved, limit = error(found.relative_error), error(found.tolerance)
    done = f"With new bases in {found.spaces} spaces and nothing cut, logits moved by {moved}, relative, in float64"
    if found.relative_error > found.tolerance:
        return f"{done}. Rounding alone explains only {limit}: the rotated model computes something else."
    control = f"half of a change moves them by {error(found.negative_control)}"
    if not found.passed:
        return f"{done}, within {limit}; but as a control, {control}: too little for the test to mean anything."
    return f"{done}: within the {limit} that rounding alone explains. As a control, {control}."


def best(trained: Trained) -> str:
    """When training was best, and whether it diverged."""
    n, steps = trained.best_step, trained.steps
    checks = trained.curve
    lost = [c.step for c in checks if c.held_out_loss is None or not math.isfinite(c.held_out_loss)]
    said = f"the best was after step {n} of {steps}" if n else f"none of {steps} steps was better"
    return f"{said}; TRAINING DIVERGED by step {lost[0]}, lower `learning_rate`" if lost else said


def recovery(trained: Trained) -> str:
    """What training brought on the text that it did not see."""
    held = trained.held_out
    return (
        f"Nats per token on {held.tokens:,} tokens of the training text that were held out: perplexity "
        f"{plain(held.before)} before, {plain(held.after)} after; {rate(trained.tokens_per_second)} tokens a second."
    )


def rounding(report: Report) -> str:
    """In how many bits weights are held."""
    asked = report.recipe.get("quantize")
    asked = asked if isinstance(asked, Mapping) else {}
    return f"at {asked.get('bits')} bits, groups of {asked.get('group')}"


def summary(report: Report) -> str:
    """The run in one paragraph."""
    name, total = report.model.name, report.costs()[0].cells
    said = [
        f"{name} ({report.model.family}) went from {total[1]} to {total[2]} stored parameters ({total[3]})."
    ]
    cut = [
        f"{width_words(widths)} ({kind_words(kind)})"
        for kind, widths in spaces(report).items()
        if any(w.kept < w.dim for w in widths)
    ]
    said.append(f"Directions kept: {'; '.join(cut)}." if cut else "Nothing was cut.")
    for data, p in list(report.perplexity.items())[:3]:
        after = p.recovered
        steps = [] if after is None else [f"to {plain(after)} after recovery"]
        if p.sliced is not None or after is None:  # a family's member is measured after it alone
            steps.insert(0, f"to {plain(p.sliced)} ({ratio(p.dense, p.sliced)})")
        said.append(f"Perplexity on {data} went from {plain(p.dense)} {', and '.join(steps)}.")
    if (t := report.recover) is not None:
        trained = (
            f"{count(t.trained_parameters)} parameters ({t.weights}) on {count(t.tokens)} tokens"
        )
        said.append(f"Recovery trained {trained}; {best(t)}.")
    if report.exactness is not None and report.exactness.passed:
        moved = error(report.exactness.relative_error)
        said.append(f"Before the cut, the changes of basis were certified exact, to {moved}.")
    return " ".join([*said, *rounded(report)])


def rounded(report: Report) -> list[str]:
    """Bytes and perplexities, rounded, in a sentence."""
    if (found := report.quantize) is None:
        return []
    b = found.bytes
    small, dense = size(b.quantized, b.dense_quantized), size(b.dense_quantized)
    said = f"Rounded {rounding(report)}, it takes {small} where the dense model, so rounded, takes {dense}"
    for data, p in list(report.perplexity.items())[:1]:
        if p.quantized is not None:
            dense = plain(p.dense_quantized)
            said += f"; its perplexity on {data} is then {plain(p.quantized)}, the dense model's {dense}"
    return [f"{said}."]


def checkpoint(model: Model, report: Report | None = None) -> str:
    """Who can load the result, and how it holds its weights."""
    why = f" No stock config holds it: {model.why_not_stock}." if model.why_not_stock else ""
    said = f"AutoModelForCausalLM loads the result once invariance is imported.{why}"
    if model.stock:
        said = f"The result is an ordinary '{model.exported_as}' checkpoint: plain transformers loads it."
    if report is None or report.quantize is None:
        return said
    return (
        f"{said} Its weights are quantised: loading needs the package torchao, which keeps every rounded weight in a "
        f"whole byte, so that the file takes {size(report.quantize.file_bytes)}. The bytes named elsewhere are those of "
        "tight packing."
    )


def commands(report: Report, output: str = "again", recipe: str = "recipe.yaml") -> list[str]:
    """What makes the result once more: a run, and of a nested family's member its extraction."""
    made = [["invariance", "run", recipe, "--output", output]]
    if report.member is not None:
        share = f"{report.member:g}"
        made.append(
            ["invariance", "extract", output, "--width", share, "--output", f"{output}-{share}"]
        )
    return [shlex.join(words) for words in made]
