"""What a recipe would do, and what a model has, as plain data: neither reads a weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from ..compress.demand import Unit, Widths
from ..compress.derived.plan import DerivedPlan
from ..compress.needs import needs
from ..compress.plan import Plan
from ..compress.planner import plan
from ..core.progress import Progress, quiet
from ..io.checkpoint import layout_of_config
from ..io.layouts import derived_layout
from ..io.models import load_config
from ..model.described import text
from ..model.families import declared
from ..recipe.recipe import load_recipe
from .derived import chart_of
from .document import stored_dtype


def planned(
    recipe: Path,
    overrides: list[str],
    *,
    trust_remote_code: bool = False,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """What `invariance plan` tells. Raises InputError, with the recipe's line."""
    asked = load_recipe(recipe, overrides)
    config = load_config(asked.model, trust_remote_code=trust_remote_code)
    stored = stored_dtype(config) or torch.float32
    calibrate = asked.calibrate
    count = (calibrate.sequences or 64) * (calibrate.tokens or 512) if calibrate else 0
    chart: Plan | DerivedPlan
    if declared(config):
        chart = plan(asked, config, progress=progress)
        needed = needs(chart, count, stored)
    else:
        chart = chart_of(asked, config)
        needed = chart.needs(stored)
    widths = chart.allocate(None)
    deep = {unit.step for unit in chart.depth}
    units = (*chart.depth, *(unit for unit in chart.units if unit.step not in deep))
    why = None
    if widths is not None:
        why = (
            chart.unsaid(widths) or None
            if isinstance(chart, DerivedPlan)
            else chart.why_not_stock(widths)
        )
    return {
        "model": asked.model,
        "order": asked.order,
        "units": [_unit(unit, widths) for unit in units],
        "parameters": {
            "dense": chart.dense.parameters({}).to_dict(),
            "sliced": None if widths is None else chart.parameters(widths).to_dict(),
        },
        "flops_per_token": {
            "dense": chart.dense.flops({}),
            "sliced": None if widths is None else chart.flops(widths),
        },
        "kv_entries_per_token": {
            "dense": chart.dense.kv_entries({}),
            "sliced": None if widths is None else chart.layout.kv_entries(widths),
        },
        "predicted_seconds": {
            "dense": chart.seconds({}),
            "sliced": None if widths is None else chart.seconds(widths),
        },
        "vocabulary": asked.vocabulary and asked.vocabulary.model_dump(),
        "budget": asked.budget and asked.budget.limits,
        "nested": {
            repr(share): None if found is None else chart.parameters(found).to_dict()
            for share, found in chart.nested(widths).items()
        },
        "needs": {"memory_bytes": needed.memory, "disk_bytes": needed.disk, "whole": needed.whole},
        "stock": None if widths is None else why is None,
        "why_not_stock": why,
    }


def _unit(unit: Unit, widths: Widths | None) -> dict[str, Any]:
    """What a plan tells of spaces that share a basis and a width."""
    methods = {kind: getattr(unit, kind) for kind in ("rotate", "select", "slice")}
    return {
        "spaces": list(unit.members),
        "group": unit.space.group.value,
        "dim": unit.space.dim,
        "width": None if widths is None else widths[unit.space.name],
        "step": unit.step,
        "rank": unit.rank,
        **{kind: method.spec() for kind, method in methods.items() if method is not None},
        "measures": sorted(s.value for s in unit.needs),
    }


def inspected(
    model: str, derived: bool = False, *, trust_remote_code: bool = False
) -> dict[str, Any]:
    """What `invariance inspect` tells: of the declared layout, or of the derived one, with its text. Raises InputError."""
    config = load_config(model, trust_remote_code=trust_remote_code)
    if derived or not declared(config):
        return _derived(model, config)
    layout, folded = layout_of_config(config), layout_of_config(config, fold=True)
    size = {"float64": 8, "float32": 4}.get(str(config.dtype).removeprefix("torch."), 2)
    return {
        "model": model,
        "family": config.model_type,
        "spaces": {
            n: {"kind": s.kind, "dim": s.dim, "copies": s.copies, "group": s.group.value}
            for n, s in folded.spaces.items()
        },
        "shortcuts": sorted(layout.shortcuts),
        "tied": layout.tied,
        "parameters": layout.parameters({}).to_dict(),
        "flops_per_token": layout.flops({}),
        "number_bytes": size,
        "kv_bytes_per_token": size * layout.kv_entries({}),
    }


def _derived(model: str, config: PretrainedConfig) -> dict[str, Any]:
    found = derived_layout(config)
    return {
        "model": model,
        "family": config.model_type,
        "spaces": {
            name: {
                "kind": name.partition("@")[0],
                "dim": s.width // s.copies,
                "copies": s.copies,
                "group": f"{s.kind.value}{s.scales}",
            }
            for name, s in found.flat().spaces.items()
        },
        "layout": text.write(found),
    }
