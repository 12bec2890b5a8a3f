"""Nothing is missed: the derived groups have as many dimensions as the null space of ∂outputs/∂weights."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from invariance.model.derive import Derived, derive
from invariance.model.derive.completeness import dimensions, null_space
from invariance.model.derive.trace import Example
from invariance.model.tiny.build import Tiny, built, from_values

SMALLER = {
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 5,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "max_position_embeddings": 8,
    "sliding_window": 8,
    "pad_token_id": None,
}
EXAMPLE: Example = {
    "input_ids": torch.randint(0, 11, (26, 8), generator=torch.Generator().manual_seed(0)),
    "use_cache": False,
}
STREAM = {"O": 28}  # rotations of 8 directions
LAYERS: dict[str, tuple[int, dict[str, int]]] = {
    "llama": (1, {**STREAM, "C": 2, "GL": 12}),
    "qwen2": (2, {**STREAM, "C": 4, "GL": 24}),  # biases of queries, keys and values
    "qwen3": (2, {**STREAM, "GL": 24}),  # norms on queries and keys: scales of their gains alone
    "gemma": (1, {**STREAM, "gains": 24, "C": 2, "GL": 12}),  # gains are 1 + w
    "gemma2": (2, {"gains": 40, "C": 4, "GL": 24}),  # norms behind branches, soft caps
    "olmo2": (1, {"GL": 12}),  # norms behind branches alone
    "exaone4": (2, {"GL": 24}),  # the same, with norms on queries and keys
    "phi3": (1, {**STREAM, "C": 2, "GL": 12}),  # fused
    "smollm3": (2, {**STREAM, "C": 2, "GL": 24 + 12}),  # one layer without positions
    "hunyuan_v1_dense": (1, {**STREAM, "GL": 12}),  # norms behind the rotation
    "apertus": (1, {**STREAM, "GL": 12}),  # an activation with weights of its own
    "bitnet": (1, {"O": 28 + 6, "C": 2}),  # norms between attention, channels and their readers
    "arcee": (1, {**STREAM, "C": 2, "GL": 12}),  # squared ReLU
    "granite": (1, {**STREAM, "C": 2, "GL": 12}),  # multipliers
    "helium": (1, {**STREAM, "C": 2, "GL": 12}),  # pairs side by side
}


def small(kind: str) -> tuple[Tiny, Derived]:
    values = {**SMALLER, "num_hidden_layers": LAYERS[kind][0]}
    made = built(from_values(kind, values), 0)
    return made, derive(made.model, [EXAMPLE])


@pytest.mark.parametrize("kind", LAYERS)
def test_all_continuous_symmetries_are_derived(kind: str) -> None:
    made, found = small(kind)
    told = dimensions(found)
    assert null_space(made.model, EXAMPLE) == told.total()
    assert told - Counter(scales=told["scales"]) == Counter(LAYERS[kind][1])


def test_a_group_that_is_left_out_is_missed() -> None:
    made, found = small("llama")
    whole = null_space(made.model, EXAMPLE)
    for block in found.blocks:
        if str(block.kind) in ("O", "C", "GL"):
            fewer = replace(found, blocks=tuple(b for b in found.blocks if b is not block))
            assert dimensions(fewer).total() < whole


def test_a_symmetry_that_is_broken_leaves_the_null_space() -> None:
    """Scores that see one key's first coordinate otherwise: a pair of it turns no more."""
    made, _ = small("llama")
    whole = null_space(made.model, EXAMPLE)
    made.model.get_submodule("model.layers.0.self_attn.k_proj").register_forward_hook(
        lambda module, inputs, out: out + torch.tensor([0.5, 0, 0, 0], dtype=out.dtype)
    )
    assert null_space(made.model, EXAMPLE) < whole


def test_too_few_outputs_are_refused() -> None:
    made, _ = small("llama")
    with pytest.raises(ValueError, match="cannot tell"):
        null_space(made.model, {**EXAMPLE, "input_ids": EXAMPLE["input_ids"][:2]})
