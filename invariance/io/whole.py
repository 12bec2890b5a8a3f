"""Whether a model in memory can be worked on: its weights must be plainly its own, and there."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedModel

from ..core.errors import InputError


def check_whole(model: nn.Module) -> PreTrainedModel:
    """The model, if it is one that can be worked on. Raises InputError, which says what to do first."""
    for what, remedy, found in _obstacles(model):
        if found:
            raise InputError(f"{type(model).__name__}: {what}. {remedy}.")
    if not isinstance(model, PreTrainedModel):
        raise InputError(
            f"{type(model).__name__}: not a model of transformers. Give a PreTrainedModel, or the path of one."
        )
    return model


def _obstacles(model: nn.Module) -> Iterable[tuple[str, str, bool]]:
    """What it might be instead, what to do then, and whether it is."""
    kind, parameters = type(model).__name__, dict(model.named_parameters())
    modules = [type(m).__module__ for m in model.modules()]
    masked = sorted(name for name in parameters if name.endswith("_orig"))
    return (
        (
            "adapters of peft stand beside its weights",
            "Merge them first: `model.merge_and_unload()` returns the model without them",
            any(m.startswith("peft.") for m in modules),
        ),
        (
            "it was compiled by torch.compile",
            "Give the model that was compiled, which is its `_orig_mod`",
            kind == "OptimizedModule",
        ),
        (
            "it is spread over devices",
            "Give the model inside, which is its `module`",
            kind in ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel"),
        ),
        (
            f"{masked[:1]} is masked by torch.nn.utils.prune, so the weight is not what is computed with",
            "Make the masks part of the weights first, by torch.nn.utils.prune.remove",
            bool(masked),
        ),
        (
            "some of its weights are offloaded or on the meta device",
            "Load it without `device_map`, or give the path of its checkpoint",
            any(p.is_meta for p in parameters.values()),
        ),
        (
            "its weights are rounded by torchao, and a rounded weight cannot change its basis",
            "Give the model before it was rounded, or the path of its checkpoint",
            any(type(p.data).__module__.startswith("torchao") for p in parameters.values()),
        ),
        (
            "its weights are no floating-point numbers",
            "Give the model before it was quantised",
            any(not p.is_floating_point() for p in parameters.values() if p.dtype != torch.bool),
        ),
    )
