"""Cut equals zeroed: coordinates that are gone change nothing that coordinates of zero would not change."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from derive_models import tokens
from described import described
from transformers import AutoModelForCausalLM

from invariance.core.errors import InputError
from invariance.model.derive.certify import TOLERANCE, distance, outputs
from invariance.model.described.description import Description
from invariance.model.described.elements import blocks, elements
from invariance.model.described.turn import turn
from invariance.model.narrow.certificate import tried
from invariance.model.narrow.cut import plan, zero
from invariance.model.narrow.positions import Kept
from invariance.model.narrow.stock import differences

PROBE = tokens(3, 11, seed=7)


def of(description: Description, stem: str, drop: int, seed: int = 0) -> Kept:
    """Every space of a stem, without some coordinates of each of its blocks."""
    rng = np.random.default_rng(seed)
    kept = {}
    for name, space in description.flat().spaces.items():
        if name.split("@")[0] == stem:
            each = [rng.choice(b, len(b) - drop, replace=False) for b in blocks(space)]
            kept[name] = np.sort(np.concatenate(each))
    return kept


@pytest.mark.parametrize(
    "kind", ["llama", "gpt_neox", "gpt2", "gemma2", "mixtral", "olmo2", "bloom"]
)
@pytest.mark.parametrize("stem", ["ch", "residual"])
def test_cut_equals_zeroed(kind, stem):
    model, description = described(kind)
    kept = of(description, stem, 8)
    reference = copy.deepcopy(model)
    zero(reference, description, kept)
    assert distance(outputs(model, PROBE), outputs(reference, PROBE)) > 1e-3  # zeros do matter
    small, done, error = tried(model, description, kept, PROBE)
    assert error <= TOLERANCE
    assert done.narrowed
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


def test_a_norm_that_forgets_its_old_width_would_show(monkeypatch):
    model, description = described("llama")
    monkeypatch.setattr("invariance.model.narrow.cut.renorm", lambda *_: False)
    assert tried(model, description, of(description, "residual", 8), PROBE)[2] > 1e-3


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
def test_a_turned_model_is_cut_as_well(kind):
    model, description = described(kind)
    turned = copy.deepcopy(model)
    turn(turned, description, elements(description, seed=3))
    kept = {**of(description, "residual", 5), **of(description, "ch", 7)}
    assert tried(turned, description, kept, PROBE)[2] <= TOLERANCE


@pytest.mark.parametrize(
    ("kind", "stem", "keys"),
    [
        ("llama", "ch", {"intermediate_size": 32}),
        ("llama", "residual", {"hidden_size": 24}),
        ("gpt2", "ch", {"n_inner": 120}),
        ("gpt_neox", "ch", {"intermediate_size": 32}),
        ("gemma2", "ch", {"intermediate_size": 32}),
        ("mixtral", "ch", {"intermediate_size": 32}),
        ("mixtral", "residual", {"hidden_size": 24, "head_dim": 8}),
    ],
)
def test_the_keys_that_hold_a_width_are_found_and_plain_transformers_reloads(
    kind, stem, keys, tmp_path
):
    model, description = described(kind)
    small, done, _ = tried(model, description, of(description, stem, 8), PROBE)
    assert {c.key.name: c.value for c in done.changes} == keys
    assert differences(small) == {}
    small.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        dtype=torch.float64,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    buffers = 1e-6  # the library computes some in float32 (a scale of the embedding)
    assert distance(outputs(small, PROBE), outputs(again, PROBE)) <= buffers
    prompt = PROBE["input_ids"][:, :5]
    written = [
        m.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=cache)
        for m, cache in ((small, False), (small, True), (again, True))
    ]
    assert all(torch.equal(w, written[0]) for w in written)


def test_layers_of_different_widths_run_and_no_config_says_them():
    model, description = described("llama")
    kept = of(description, "ch", 8)
    kept["ch@1"] = kept["ch@1"][:20]
    small, done, error = tried(model, description, kept, PROBE)
    assert error <= TOLERANCE
    assert done.changes == ()
    assert small.model.layers[1].mlp.up_proj.out_features == 20
    assert {n.split(".")[-2] for n in differences(small)} >= {"up_proj", "down_proj"}


def test_a_layer_norm_becomes_one_that_divides_by_its_old_width():
    model, description = described("gpt2")
    small, done, error = tried(model, description, of(description, "residual", 8), PROBE)
    assert error <= TOLERANCE
    assert len(done.replaced) == 5
    assert {type(small.get_submodule(n)).__name__ for n in done.replaced} == {"NormOver"}
    prompt = PROBE["input_ids"][:, :5]
    written = [
        small.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=c)
        for c in (False, True)
    ]
    assert torch.equal(*written)


def test_a_tie_is_kept():
    model, description = described("llama")
    tied = copy.deepcopy(model)
    tied.lm_head.weight = tied.model.embed_tokens.weight
    tied.config.tie_word_embeddings = True
    small, _, error = tried(tied, description, of(description, "residual", 8), PROBE)
    assert error <= TOLERANCE
    assert small.lm_head.weight is small.model.embed_tokens.weight


def test_slices_of_a_stack_keep_as_many():
    model, description = described("mixtral")
    kept = of(description, "ch", 8)
    kept["ch@0"] = kept["ch@0"][1:]
    with pytest.raises(InputError, match="different widths in its slices"):
        plan(model, description, kept, PROBE)
    with pytest.raises(InputError, match="no space mlp@0"):
        plan(model, description, {"mlp@0": np.arange(3)}, PROBE)
