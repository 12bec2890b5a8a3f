"""What one token costs a model, counted as the model runs: any causal model of transformers will do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, PreTrainedModel

from ..core.errors import InputError


@dataclass(frozen=True)
class Costs:
    """Per token: two FLOPs for every entry of a matrix that multiplies it, and numbers in a cache; attention scores are
    left out."""

    flops: int
    head_flops: int
    kv_entries: int


@torch.no_grad()
def counted(model: PreTrainedModel, name: str) -> Costs:
    """What a token costs. Raises InputError for a model that does not generate as ``forward`` asks it to."""
    head = model.get_output_embeddings()
    try:
        with FlopCounterMode(display=False) as counter:
            one = _cached(forward(model, _tokens(model, 1), DynamicCache(**_own(model))))
        two = _cached(forward(model, _tokens(model, 2), DynamicCache(**_own(model))))
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError) as e:
        why = " ".join(f"{type(e).__name__}: {e}".split())[:200]
        raise InputError(
            f"{name}: a model of type '{model.config.model_type}' does not run on a token with a growing cache ({why}), so "
            "generation cannot be timed. Measure its text with `evaluate`."
        ) from None
    found = counter.get_flop_counts()["Global"]
    flops = sum(n for op, n in found.items() if "attention" not in str(op))
    return Costs(flops, 0 if head is None else 2 * head.weight.numel(), two - one)


def forward(model: PreTrainedModel, ids: Tensor, cache: DynamicCache) -> Any:
    """One pass behind what is cached; logits of the last tokens alone."""
    return model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)


def _own(model: PreTrainedModel) -> dict[str, Any]:
    return {"config": model.config.get_text_config()}


def _tokens(model: PreTrainedModel, n: int) -> Tensor:
    return torch.ones(1, n, dtype=torch.long, device=model.device)


def _cached(out: Any) -> int:
    """How many keys and values are kept."""
    layers = out.past_key_values.layers
    held = (getattr(layer, part, None) for layer in layers for part in ("keys", "values"))
    return sum(t.numel() for t in held if isinstance(t, Tensor))
