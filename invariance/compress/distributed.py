"""Calibration by several processes: each takes some of the batches, and their moments are added by an all-reduce."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric import Fabric
from torch import Tensor

from ..calibrate.moment import Known, Moment
from ..calibrate.moments import Key, Moments
from ..core.cache import cache_dir
from ..core.errors import InputError
from ..io.data import Tokens
from ..io.hub import quiet
from ..io.models import load_model
from ..method.interfaces import begin
from ..recipe.recipe import Recipe
from . import calibration
from .plan import Plan
from .planner import plan

if TYPE_CHECKING:
    from .execution import Execution

START = "ddp_spawn"  # a fork would hang where torch has threads already


def calibrate(plans: Sequence[Plan], tokens: Tokens, execution: Execution) -> None:
    """Measure in several processes what ``calibration.calibrate`` would in one, into the same store.

    Batches go to the processes in turn, so the sums are those of one process in another order: they agree to float64
    rounding. A statistic that no walk measures (the output's Fisher) is left to the caller.
    """
    recipe = plans[0].recipe
    assert recipe.calibrate is not None
    batches = -(-len(tokens.ids) // recipe.calibrate.batch)
    if batches < execution.processes:
        raise InputError(
            f"{recipe.where('calibrate')}: {batches} batches for {execution.processes} processes. Use fewer processes, or a "
            "smaller `batch`."
        )
    accelerator = "cuda" if execution.device == "cuda" else "cpu"
    fabric: Any = Fabric(accelerator=accelerator, devices=execution.processes, strategy=START)
    fabric.launch(
        _measure, [p.recipe.to_dict() for p in plans], tokens.ids, tokens.mask, vars(execution)
    )


def _measure(
    fabric: Fabric,
    recipes: list[dict[str, Any]],
    ids: Tensor,
    mask: Tensor,
    execution: dict[str, Any],
) -> None:
    """One process's part; the first of them keeps the sums. Fabric hands on plain data and tensors only."""
    begin(execution["plugins"])
    torch.set_num_threads(
        max((execution["threads"] or torch.get_num_threads()) // execution["processes"], 1)
    )
    with quiet():
        model = load_model(
            recipes[0]["model"],
            device=fabric.device,
            trust_remote_code=execution["trust_remote_code"],
        )
    plans = [plan(Recipe.from_dict(found), model.config) for found in recipes]

    def add(moments: Moments) -> Moments:
        return merged(fabric, moments)

    share = calibration.Share(fabric.global_rank, fabric.world_size, add)
    calibration.calibrate(model, plans, Tokens(ids, mask), store=cache_dir("moments"), share=share)
    fabric.barrier()


def merged(fabric: Any, moments: Moments) -> Moments:
    """The moments of all processes together, in float64, in each of them."""
    found: dict[Key, Known] = {}
    for key in sorted(moments.known, key=lambda k: (k[0], k[1].value)):  # the same order everywhere
        mine = moments.known[key]
        total = fabric.all_reduce(mine.total.to(fabric.device), reduce_op="sum").cpu()
        count = torch.tensor(mine.count, dtype=torch.float64, device=fabric.device)
        found[key] = Moment(total, fabric.all_reduce(count, reduce_op="sum").item())
    return Moments(found)
