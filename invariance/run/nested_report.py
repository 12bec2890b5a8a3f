"""What a report says of nested members: what each costs as a checkpoint of its own, and what it is worth."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from ..compress.nested import Members, extract, members
from ..compress.plan import Plan
from ..compress.sliced import Sliced
from ..core.progress import Progress
from ..io.export import cast
from ..io.memo import Memo
from ..measure.evaluate import Evaluation, measure
from ..model.labels import label
from ..recipe.recipe import Recipe

Report = Mapping[str, Any]
COSTS = ("parameters", "flops_per_token", "kv_bytes_per_token", "predicted_seconds")


def members_of(sliced: Sliced, recipe: Recipe) -> Members:
    """The nested members of a sliced model, itself the first; none where the recipe asks for none."""
    if recipe.budget is None or recipe.nested is None:
        return {}
    (widest,) = recipe.budget.limits.values()
    return members(label(sliced.model), widest, sliced.narrower)


def costs(
    recipe: Recipe, chart: Plan, sliced: Sliced, stored: torch.dtype
) -> list[dict[str, Any]] | None:
    """Of each nested member, the widest first, what it costs as a checkpoint of its own; None where there are none."""
    if recipe.budget is None or recipe.nested is None:
        return None
    (widest,) = recipe.budget.limits.values()
    return [
        {
            "share": share,
            "parameters": chart.parameters(widths).to_dict(),
            "flops_per_token": chart.flops(widths),
            "kv_bytes_per_token": stored.itemsize * chart.layout.kv_entries(widths),
            "predicted_seconds": chart.seconds(widths),
            "why_not_stock": chart.why_not_stock(widths),
            "widths": {name: widths.get(name, s.dim) for name, s in chart.layout.spaces.items()},
            "predicted": sliced.members.get(share, sliced.foretold).loss,
            "predicted_by": sliced.members.get(share, sliced.foretold).by,
            "perplexity": {},
        }
        for share, widths in {widest: sliced.widths, **sliced.narrower}.items()
    ]


def measure_members(
    report: Report,
    small: PreTrainedModel,
    dense: PreTrainedModel,
    stored: torch.dtype,
    evaluations: Iterable[Evaluation],
    progress: Progress,
    memo: Memo,
) -> None:
    """Give each nested member its perplexities, as a report has them; those of the widest are the report's own."""
    asked = [e for e in evaluations if e.kind == "perplexity"]
    side = "recovered" if report["recover"] else "sliced"
    widest, *narrower = report["nested"]
    widest["perplexity"] = report["perplexity"]
    for found in narrower:
        one, _ = extract(small, found["share"])
        cast(one, stored)
        cast(one, dense.dtype)
        measured = measure(asked, {"dense": dense, side: one}, progress, memo)["perplexity"]
        found["perplexity"] = {
            name: {"sliced": None, "recovered": None, **each} for name, each in measured.items()
        }


def of_member(report: Report, share: float, model: PreTrainedModel, why: str) -> dict[str, Any]:
    """A family's report as that of one member: its costs and its perplexities; what was not measured of it is left out."""
    found = next(each for each in report["nested"] if each["share"] == share)
    costs = {key: {"dense": report[key]["dense"], "sliced": found[key]} for key in COSTS}
    how = {"exported_as": model.config.model_type, "stock": not why, "why_not_stock": why or None}
    measured: list[Any] = [
        each["extra_loss"].get("sliced") for each in found["perplexity"].values()
    ]
    unmeasured: dict[str, Any] = {
        "divergence": {},
        "tasks": [],
        "samples": [],
        "search": None,
        "nested": None,
        "tokens_per_second": {"dense": None, "sliced": None},
    }
    return {
        **report,
        **costs,
        **unmeasured,
        "model": {**report["model"], **how},
        "member": share,
        "perplexity": found["perplexity"],
        "predicted": {
            "loss": found["predicted"],
            "by": found["predicted_by"],
            "measured": measured[0]["value"] if any(measured[:1]) else None,
            "energy": {},
        },
        "widths": found["widths"],
    }
