"""Few layers and few experts, on weights without memory, tell what the whole model tells."""

from __future__ import annotations

import copy

import pytest
import torch
from derive_models import tokens
from described import SHAPE, described, description_of, small
from transformers import AutoConfig

from invariance.model.derive.certify import TOLERANCE, distance, outputs
from invariance.model.described import text
from invariance.model.described.elements import elements
from invariance.model.described.experts import fewer, stretch
from invariance.model.described.real import layout_text
from invariance.model.described.shallow import layer_types, shallow
from invariance.model.described.turn import turn
from invariance.model.described.weightless import on_meta, weightless, weights

DEEP = {
    "llama": {"num_hidden_layers": 5},
    "gemma3_text": {  # two types of layers
        "num_hidden_layers": 4,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 8,
    },
    "gpt_neox": {"num_hidden_layers": 4, "rotary_pct": 0.5},
}


@pytest.mark.parametrize("kind", DEEP)
def test_the_layout_of_few_layers_is_the_layout_of_all(kind):
    model = small(kind, **DEEP[kind])
    found = layout_text(model.config, kind)
    assert text.write(found) == text.write(description_of(model, kind))
    assert sum(len(part.layers) for part in found.layers) == model.config.num_hidden_layers


def test_real_weights_are_turned_by_a_layout_that_never_saw_them():
    model = small("gemma3_text", **DEEP["gemma3_text"])
    found = layout_text(model.config)
    turned = copy.deepcopy(model)
    turn(turned, found, elements(found))
    probe = tokens(3, 11, seed=7)
    assert distance(outputs(model, probe), outputs(turned, probe)) <= TOLERANCE


def test_types_of_layers_are_told_apart_by_what_they_are_not_by_their_number():
    config = AutoConfig.for_model("gemma3_text", **{**SHAPE, **DEEP["gemma3_text"]})
    assert layer_types(on_meta(config), config, 4) == [[0, 2], [1, 3]]
    config = AutoConfig.for_model("llama", **{**SHAPE, **DEEP["llama"]})
    assert layer_types(on_meta(config), config, 5) == [[0, 1, 2, 3, 4]]
    assert shallow(config).stands == {0: (0,), 1: (1, 2, 3, 4)}


def test_a_few_experts_stand_for_all():
    model, _ = described("mixtral")
    config = copy.deepcopy(model.config)
    config.num_local_experts = 64
    found = next(fewer(config, on_meta(config)))
    assert (found.few, found.all) == (8, 64)
    few = stretch(layout_text(found.config, "mixtral"), 8, 16)
    config.num_local_experts = 16
    every = text.read(text.write(few))
    assert every == layout_text(config, "mixtral")
    told = text.write(every)
    assert "in 16 of 40: i<16{[40i:+40]}" in told
    assert "space experts@     SWAP         16: (0 1)" in told


def test_weights_take_the_memory_of_a_vector():
    w = weights((1000, 2000), seed=1)
    assert w.untyped_storage().nbytes() < 8 * 3001
    assert torch.linalg.matrix_rank(w[:50, :50]) == 50
    config = AutoConfig.for_model("llama", **{**SHAPE, "hidden_size": 2048, "num_hidden_layers": 1})
    model = weightless(config)
    held = sum(p.untyped_storage().nbytes() for p in model.parameters())
    assert held < 0.01 * sum(p.nbytes for p in model.parameters())
