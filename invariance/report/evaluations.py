"""What evaluations found, as tables: perplexity, divergence by position, tasks; and samples for the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable

from .document import (
    SIDES,
    Divergence,
    Lost,
    Mean,
    Measured,
    Perplexity,
    Report,
    Task,
    Texts,
    Within,
)
from .grid import Grid
from .units import NONE, Number, count, plain, ratio, signed, size, times, whole, within

FAR_APART = 1.25  # texts outside calibration lose so many times more than those inside


def grids(found: Measured) -> list[Grid]:
    """All tables, those of what was measured."""
    parts = [g for name, each in found.divergence.items() for g in divergence(name, each)]
    return [*perplexity(found), *parts, *tasks(found)]


def windows(found: Perplexity) -> str:
    """On what a perplexity was measured."""
    tokens = f"{whole(found.tokens)} tokens"
    if found.window is None or found.stride is None:
        return tokens
    overlap = "" if found.stride >= found.window else f", stride {found.stride}"
    return f"{tokens}, window {found.window}{overlap}"


def perplexity(found: Measured) -> list[Grid]:
    """A line for every model and data, against the first model."""
    rows, compared = [], False
    for name, each in found.perplexity.items():
        reference = next(iter(each.known), None)
        for side, value in each.known.items():
            data = [f"{name} ({windows(each)})", SIDES[side], plain(value)]
            if side == reference:
                rows.append([*data, "", ""])
                continue
            compared, extra = True, each.extra_loss.get(side, Mean())
            first = getattr(each, str(reference))
            rows.append([*data, ratio(first, value), signed(extra.value, extra.standard_error)])
    note = "; ± is one standard error over windows" if compared else ""
    columns = ["data", "model", "perplexity", "ratio", "nats per token"]
    if not compared:
        columns, rows = columns[:3], [row[:3] for row in rows]
    caption = f"Perplexity: exp of the mean next-token loss; lower is better{note}."
    return [Grid(caption, columns, rows, 2)] if rows else []


def divergence(name: str, found: Divergence) -> list[Grid]:
    """By position, one table for each model that was compared."""
    made = []
    for side, each in found.known.items():
        if side == found.reference:
            continue
        rows = [_within("all positions", each)]
        rows += [_within(f"{p.first} to {p.last}", p) for p in each.positions]
        caption = (
            f"{name}, {SIDES[side]} against {found.reference}, window {each.window}: KL and loss in nats per "
            "token, by how many tokens stand before the one that is predicted."
        )
        columns = ["tokens before", "tokens", "KL", "same first choice", "extra loss"]
        made.append(Grid(caption, columns, rows))
    return made


def _within(name: str, found: Within) -> list[str]:
    kl = NONE if found.kl is None else f"{found.kl:.4f}{within(found.kl_standard_error, 4)}"
    same = NONE if found.agreement is None else f"{100 * found.agreement:.1f} %"
    extra = signed(found.extra_loss, found.extra_loss_standard_error, 4)
    return [name, whole(found.tokens), kl, same, extra]


def tasks(found: Measured) -> list[Grid]:
    """A line for every metric and model, with its difference from the first model."""
    rows = [row for each in found.tasks for row in _scores(each)]
    compared = any(each.difference for each in found.tasks)
    columns = ["task", "metric", "model", "questions", "shots", "score"]
    columns += ["difference", "p", "significant"] if compared else []
    note = (
        " Differences are of the same questions; significant at 5 % for all rows together (Holm)."
    )
    caption = f"Tasks, ± one standard error.{note if compared else ''}"
    cut = [row[: len(columns)] for row in rows]
    return [Grid(caption, columns, cut, 3)] if rows else []


def _scores(found: Task) -> list[list[str]]:
    metric = found.metric if found.filter == "none" else f"{found.metric}, {found.filter}"
    rows = []
    for side, mean in found.known.items():
        about = [found.task, metric, SIDES[side], whole(found.questions), str(found.shots)]
        rows.append([*about, _score(mean), "", "", ""])
        if (d := found.difference.get(side)) is not None:
            p = NONE if d.p is None else f"{d.p:.3g}"
            verdict = NONE if d.significant is None else "yes" if d.significant else "no"
            rows[-1][-3:] = [signed(d.difference, d.standard_error), p, verdict]
    return rows


def _score(found: Mean) -> str:
    if found.value is None or math.isnan(found.value):
        return NONE
    return f"{found.value:.3f}{within(found.standard_error)}"


def data(report: Report) -> list[Grid]:
    """What was read to calibrate and to train: how much of which text, and how it begins."""
    rows = [
        [use, s.name or s.data, whole(s.sequences), whole(s.tokens), s.start or NONE]
        for use, sources in report.data.items()
        for s in sources
    ]
    columns = ["for", "text", "sequences", "tokens", "begins"]
    return [Grid("Texts that were read.", columns, rows, 5)] if rows else []


def texts(found: Texts) -> list[Grid]:
    """Each text's ratio, in calibration and out of it, their mean and the worst; where there is more than one."""
    if len(found.each) < 2:
        return []
    sides, rows = list(found.all), []
    for name, text in found.each.items():
        known = NONE if text.calibrated is None else "yes" if text.calibrated else "no"
        rows.append([name, known, *(times(text.ratio.get(s)) for s in sides)])
    groups = {"": found.all, ", calibrated on": found.calibrated}
    for which, lost in (groups | {", not calibrated on": found.unseen}).items():
        if lost and (not which or lost != found.all):
            means = (times(lost[s].geometric_mean) if s in lost else NONE for s in sides)
            worst = (times(lost[s].worst) if s in lost else NONE for s in sides)
            rows += [[f"geometric mean{which}", "", *means], [f"worst{which}", "", *worst]]
    note = "Perplexity over the dense model's, text by text." + warning(found)
    return [Grid(note, ["text", "calibrated", *(SIDES[s] for s in sides)], rows, 2)]


def warning(found: Texts) -> str:
    """A sentence where texts that did not calibrate lose much more than those that did; else nothing."""
    for side, inside in (found.calibrated or {}).items():
        low, outside = inside.geometric_mean, (found.unseen or {}).get(side, Lost())
        if low and (high := outside.geometric_mean) and high > FAR_APART * low:
            return (
                f" On texts that did not calibrate it, the {SIDES[side]} model loses much more: "
                f"{high:.2f}× against {low:.2f}×. Calibrate on a mixture."
            )
    return ""


def members(report: Report) -> list[Grid]:
    """The nested members of a family side by side, where it is one."""
    if not (found := report.nested):
        return []
    dense = report.parameters.dense
    names = list(found[0].perplexity)
    rows = []
    for each in found:
        total = each.parameters.total
        kept = [
            f"{each.share:g}",
            count(total),
            ratio(None if dense is None else dense.total, total),
        ]
        costs = [count(each.flops_per_token), size(each.kv_bytes_per_token)]
        worth = [plain(_best(each.perplexity[n])) if n in each.perplexity else NONE for n in names]
        rows.append([*kept, *costs, *worth, "no" if each.why_not_stock else "yes"])
    columns = ["share", "parameters", "of dense", "FLOPs per token", "KV cache per token"]
    columns += [*(f"perplexity, {name}" for name in names), "stock"]
    note = "Nested members: invariance extract with --width and a share makes one a checkpoint of its own."
    return [Grid(note, columns, rows)]


def _best(found: Perplexity) -> Number:
    return found.sliced if found.recovered is None else found.recovered


def samples(found: Measured) -> list[Grid]:
    """Continuations side by side, a table for each prompt."""
    return [
        Grid(each.prompt, [SIDES[s] for s in each.known], [_texts(each.known.values())], 9, True)
        for each in found.samples
    ]


def _texts(found: Iterable[str]) -> list[str]:
    return [text.strip() or NONE for text in found]
