"""Heads made narrower, and experts that go: what is left computes what the whole computes without them."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from derive_models import tokens
from described import KINDS, described, description_of, small
from torch.utils._python_dispatch import TorchDispatchMode

from invariance.core.errors import InputError
from invariance.model.derive.certify import TOLERANCE, distance, outputs
from invariance.model.derive.precision import in_double
from invariance.model.described.elements import blocks
from invariance.model.narrow.certificate import tried
from invariance.model.narrow.cut import Way, cut, plan, zero
from invariance.model.narrow.heads import cut_heads, heads, narrower

PROBE = tokens(3, 11, seed=7)
HEADS = {
    "llama": {},  # a key for the width, pairs
    "qwen2": {},  # biases, no key for the width
    "gpt_neox": KINDS["gpt_neox"],  # fused, partly turned
    "gpt2": KINDS[
        "gpt2"
    ],  # fused and split, no positions in the heads, scores scaled by what is seen
    "falcon": {"new_decoder_architecture": False, "multi_query": True},  # one head of keys
}


@pytest.mark.parametrize("kind", HEADS)
def test_narrower_heads_equal_zeroed_ones(kind):
    model = small(kind, **HEADS[kind])
    description = description_of(model, kind)
    kept = {
        n: k
        for h in heads(description.flat())
        for n, k in narrower(description.flat(), h, 2).items()
    }
    reference = copy.deepcopy(model)
    zero(reference, description, kept)
    assert distance(outputs(model, PROBE), outputs(reference, PROBE)) > 1e-4
    narrow, _, error = cut_heads(model, description, 2, PROBE)
    assert error <= TOLERANCE
    prompt = PROBE["input_ids"][:, :5]
    written = [
        narrow.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=c)
        for c in (False, True)
    ]
    assert torch.equal(*written)


def test_pairs_go_by_twos_and_heads_keep_some():
    flat = described("llama")[1].flat()
    (first, _) = heads(flat)
    with pytest.raises(InputError, match="an even number"):
        narrower(flat, first, 3)
    with pytest.raises(InputError, match="cannot go"):
        narrower(flat, first, 8)


def test_norms_on_queries_and_keys_leave_no_heads_to_narrow():
    model = small("qwen3", head_dim=8)
    with pytest.raises(InputError, match="no layer"):
        cut_heads(model, description_of(model), 2, PROBE)


LATENT = {
    "num_key_value_heads": 4,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "head_dim": 4,
}


@pytest.mark.parametrize(
    ("stem", "key"), [("vo", "v_head_dim"), ("qk2", "qk_nope_head_dim"), ("inner", "q_lora_rank")]
)
def test_where_a_module_lets_them_values_queries_and_latents_narrow_alone(stem, key):
    model = small("deepseek_v3", **LATENT)
    description = description_of(model)
    kept = {
        name: np.sort(blocks(space)[:, :-2].reshape(-1))
        for name, space in description.flat().spaces.items()
        if name.split("@")[0] == stem
    }
    _, done, error = tried(model, description, kept, PROBE)
    assert error <= TOLERANCE
    assert [(c.key.name, c.value) for c in done.changes] == [(key, LATENT[key] - 2)]


class Never(TorchDispatchMode):
    """Scores of some experts are minus infinity, wherever a router's weight is used."""

    def __init__(self, routers: dict[int, list[int]]):
        super().__init__()
        self.routers = routers

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = in_double(func, args, kwargs or {})
        for t in args:
            gone = (
                self.routers.get(t.untyped_storage()._cdata)
                if isinstance(t, torch.Tensor)
                else None
            )
            if gone is not None and func._schema.name in ("aten::mm", "aten::addmm"):
                out[:, gone] = -torch.inf
        return out


def test_experts_that_go_are_never_chosen():
    model, description = described("mixtral")
    flat = description.flat()
    kept = {"experts@0": np.array([0, 1, 3]), "experts@1": np.array([1, 2, 3])}
    assert all(flat.spaces[n].width == 4 for n in kept)
    gone = {"0": [2], "1": [0]}
    routers = {
        model.get_parameter(f"model.layers.{i}.mlp.gate.weight").untyped_storage()._cdata: g
        for i, g in gone.items()
    }
    whole = outputs(model, PROBE)
    with Never(routers):
        reference = outputs(model, PROBE)
    assert distance(whole, reference) > 1e-3
    fewer = copy.deepcopy(model)
    todo = plan(fewer, description, kept, PROBE)
    done = cut(fewer, description, kept, todo, Way.SAID)
    assert distance(reference, outputs(fewer, PROBE)) <= TOLERANCE
    assert [(c.key.name, c.value) for c in done.changes] == [("num_local_experts", 3)]
    assert fewer.model.layers[0].mlp.experts.gate_up_proj.shape[0] == 3
