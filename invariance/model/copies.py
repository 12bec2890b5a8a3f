"""Copies of a model in another dtype."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


def double_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The model in float64, with attention that computes in it; no copy in the model's own dtype in between."""
    return copy_in(torch.float64, model)


def copy_in(dtype: torch.dtype, model: PreTrainedModel) -> PreTrainedModel:
    """The model in a dtype, as ``double_copy``."""
    made: dict[int, Any] = {
        id(p): nn.Parameter(p.detach().to(dtype, copy=True), p.requires_grad)
        for p in model.parameters()
    }
    made |= {
        id(b): b.to(dtype, copy=True) if b.is_floating_point() else b.clone()
        for b in model.buffers()
    }
    twin = copy.deepcopy(model, made).eval()
    if twin._can_set_attn_implementation():  # else masks would be made for another attention
        twin.config._attn_implementation = "sdpa"
    return twin
