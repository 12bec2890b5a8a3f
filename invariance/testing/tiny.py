"""Tiny models of a few families, with weights that hide nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ..model.architecture import Architecture, Rms
from ..model.families import known

VOCABULARY = 31
LENGTH = 32  # the most positions that a tiny model takes
WORDS = 41  # the vocabulary of ``model_of``
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 64, "head_dim": 8, "tie_word_embeddings": True},
    "qwen3": {"intermediate_size": 64, "head_dim": 8},
    "gemma3_text": {"intermediate_size": 64, "head_dim": 8},
    "opt": {"ffn_dim": 64},
    "phi": {
        "intermediate_size": 64,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
        },
    },
}


def model_of(family: str, **options: Any) -> PreTrainedModel:
    """A tiny model, 32 wide, two layers deep, with room for 320 positions."""
    shape = {"vocab_size": WORDS, "hidden_size": 32, "max_position_embeddings": 320}
    return tiny(family, **(shape | SHAPES[family] | options))


def tiny(family: str, seed: int = 0, **options: Any) -> PreTrainedModel:
    """A model of a family in float32, two layers and 16 wide unless the config's options say otherwise."""
    heads = options.get("num_attention_heads", 4)
    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "max_position_embeddings": LENGTH,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
        "tie_word_embeddings": False,
    }
    if family == "opt":
        own: dict[str, Any] = {"ffn_dim": 24, "dropout": 0.0}
    else:
        own = {"intermediate_size": 24, "num_key_value_heads": heads // 2}
        if family in ("mistral", "qwen2", "qwen3"):
            own["sliding_window"] = None
        if family == "qwen3":
            own["head_dim"] = 4
        if family == "gemma3_text":
            own |= {"head_dim": 4, "query_pre_attn_scalar": 6, "sliding_window": 3}
            layers = options.get("num_hidden_layers", 2)
            own["layer_types"] = [
                "sliding_attention",
                "full_attention",
                "sliding_attention",
                "full_attention",
            ][:layers]
    config = AutoConfig.for_model(family, **(common | own | options))
    return redraw(AutoModelForCausalLM.from_config(config).eval(), seed)


@torch.no_grad()
def redraw(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Random weights of a size that keeps stream, scores and logits near one; no gain or bias is trivial.

    All that writes the stream has a mean, so that centring it is no small thing.
    """
    g = torch.Generator().manual_seed(seed)
    found = known(model.config)
    scaled, rms = (found.scaled, found.rms) if isinstance(found, Architecture) else (False, Rms())
    for name, module in model.named_modules():
        weight: Any = getattr(module, "weight", None)
        bias: Any = getattr(module, "bias", None)
        if isinstance(module, nn.Linear):
            mean = 0.3 * torch.randn(1, module.in_features, generator=g)
            drawn = torch.randn(weight.shape, generator=g) + (0 if name == "lm_head" else mean)
            weight.copy_(drawn / module.in_features**0.5)
        elif isinstance(module, nn.Embedding):
            small = (model.config.tie_word_embeddings and "position" not in name) or scaled
            weight.copy_(
                (torch.randn(weight.shape, generator=g) + 0.3)
                * (weight.shape[1] ** -0.5 if small else 0.7)
            )
        elif weight is not None:
            weight.copy_(1 - rms.offset + 0.3 * torch.randn(weight.shape, generator=g))
        if bias is not None:
            bias.copy_(0.3 * torch.randn(bias.shape, generator=g) + 0.2)
    return model
