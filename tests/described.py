"""Descriptions of tiny models, for tests."""

from __future__ import annotations

from functools import cache

import torch
from derive_models import examples, tokens
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from invariance.model.derive import derive
from invariance.model.described.describe import describe
from invariance.model.described.description import Description
from invariance.model.described.source import source
from invariance.model.described.weightless import plain
from invariance.model.tiny import random_weights, untie

SHAPE: dict[str, object] = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# one of each: grouped heads, fused and interleaved, transposed with biases, post-norms, experts in stacks,
# latents, norms of heads, several scales a coordinate
KINDS: dict[str, dict[str, object]] = {
    "llama": {},
    "gpt_neox": {"rotary_pct": 0.5},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmo2": {},
    "bloom": {"n_head": 4, "n_layer": 2},
}
SEEDS = {"mixtral": 5}  # where one pass reaches every expert


@cache
def described(kind: str) -> tuple[PreTrainedModel, Description]:
    """A tiny model of a kind and its description. Neither may be changed."""
    model = small(kind, SEEDS.get(kind, 0), **KINDS.get(kind, {}))
    return model, description_of(model, kind)


def small(kind: str, seed: int = 0, **more: object) -> PreTrainedModel:
    """A tiny model in float64 whose every weight is random; nothing is tied."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **{**SHAPE, **more})
    model = plain(config).double().eval().requires_grad_(False)
    untie(model)
    random_weights(model, seed)
    return model


def description_of(model: nn.Module, what: str = "") -> Description:
    traced = [tokens(8, 32), *examples()]  # so many tokens that every expert is reached at once
    return describe(source(derive(model, traced), model), what, seen_by=(model, traced[0]))
