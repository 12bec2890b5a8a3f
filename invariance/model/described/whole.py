"""A model in memory made ready for what a layout says: float64, attention and experts as plain ops, nothing tied."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..copies import copy_in
from ..derive.trace import Example
from ..tiny import untie


def double(model: PreTrainedModel, apart: bool = True) -> PreTrainedModel:
    """A copy in float64; where ``apart``, its head gets a weight of its own if it shares that of the table."""
    twin = plain_ops(copy_in(torch.float64, model))
    if apart and untie(twin):
        twin.config.get_text_config().tie_word_embeddings = False
    return twin.requires_grad_(False)


def plain_ops(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, its attention and its experts written out in ops, where its family lets them be."""
    for choose in (model.set_attn_implementation, model.set_experts_implementation):
        try:
            choose("eager")
        except (ValueError, NotImplementedError, AttributeError):
            continue  # a family that has one way only
    return model


def tokens(ids: Tensor) -> Example:
    """What a causal model's forward takes."""
    return {"input_ids": ids, "use_cache": False}
