"""Default configs made small: relations between numbers stay, and complaints are answered."""

from __future__ import annotations

import pytest
import torch

from invariance.core.errors import InputError
from invariance.model.derive.certify import outputs
from invariance.model.tiny import tiny
from invariance.model.tiny.repair import repaired
from invariance.model.tiny.shrink import parts, small_values
from invariance.model.tiny.sizes import Scale


def test_numbers_that_are_equal_or_multiples_by_default_stay_so() -> None:
    scale = Scale.of({"hidden_size": 4096, "num_attention_heads": 32})
    assert scale.small("hidden_size", 4096) == 32 and scale.small("adapter_in_dim", 4096) == 32
    assert (
        scale.small("num_key_value_heads", 32) == 4 and scale.small("num_key_value_heads", 8) == 2
    )
    assert scale.small("inner_width", 8192) == 64 and scale.small("conv_kernel", 4) == 4


def test_one_layer_of_each_kind_is_kept_with_its_entry_in_every_list() -> None:
    kinds = ["a", "a", "b", "a", "c", "c"]
    small = small_values({"num_hidden_layers": 6, "layer_types": kinds, "hidden_size": 64})
    assert small["layer_types"] == ["a", "b", "c"] and small["num_hidden_layers"] == 3


def test_sections_of_a_head_still_add_up() -> None:
    assert parts([16, 24, 24], 4) == [1, 1, 2] or sum(parts([16, 24, 24], 4)) == 4


@pytest.mark.parametrize(
    "complaint, changed",
    [
        (
            "ValueError: hidden_size_per_layer_input must be 0, got 256",
            ("hidden_size_per_layer_input", 0),
        ),
        ("AttributeError: 'XConfig' object has no attribute 'rope_theta'", ("rope_theta", 10000.0)),
        ("ValueError: b must match a", ("b", 7)),
    ],
)
def test_a_config_s_complaint_becomes_a_value(complaint: str, changed: tuple) -> None:
    answer = repaired({"a": 7}, complaint, {})
    assert answer is not None and answer[changed[0]] == changed[1]
    assert repaired({}, "something that nobody knows", {}) is None


@pytest.mark.parametrize("kind", ["llama", "deepseek_v3", "bamba", "gpt_neo", "zamba", "musicgen"])
def test_a_tiny_model_runs_and_has_no_weight_at_zero(kind: str) -> None:
    made = tiny(kind)
    assert sum(p.numel() for p in made.model.parameters()) < 300_000
    assert torch.isfinite(outputs(made.model, made.tokens())).all()
    assert all(bool((p != 0).any()) for p in made.model.parameters())


def test_a_type_that_cannot_be_made_says_what_was_tried() -> None:
    with pytest.raises(InputError, match="blt: its default config cannot be made small"):
        tiny("blt")
