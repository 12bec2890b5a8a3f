"""Tiny models with random weights, for tests of the derivation."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from invariance.model.derive.trace import Example

_SHAPE = {
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


def causal(kind: str, **more: Any) -> nn.Module:
    """A model of a type, in float64, every weight random, gains and biases included."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**_SHAPE, **more})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").double().eval()
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is table.weight:
        head.weight = nn.Parameter(table.weight.detach().clone())
    for p in model.parameters():
        noise = torch.randn_like(p) / max(1, p.shape[-1] if p.dim() > 1 else 4) ** 0.5
        p.data.add_(0.3 * noise + 0.02)
        p.requires_grad_(False)
    return model


def tokens(sequences: int = 2, length: int = 12, seed: int = 1) -> Example:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 60, (sequences, length), generator=generator)
    return {"input_ids": ids, "use_cache": False}


def examples() -> list[Example]:
    """One that is traced, and more for experts that it does not reach."""
    return [tokens(), *(tokens(6, 16, seed) for seed in (2, 3, 4))]
