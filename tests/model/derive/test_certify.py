"""What is derived holds on inputs that were not traced; each group is found where the theory says so."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from derive_models import certified, derived, found, made

from invariance.model.derive import Kind, Plan, Probe, certify
from invariance.model.derive.certify import TOLERANCE, Trial, outputs
from invariance.model.derive.elements import Element

GROUPS = {
    "llama": {
        ("residual", Kind.O, 32): 1,
        ("vo", Kind.GL, 8): 8,
        ("qk", Kind.C, 2): 32,
        ("ch", Kind.PERM, 40): 2,
        ("heads", Kind.NODES, 4): 2,
    },
    "gpt2": {
        ("residual", Kind.O1, 32): 1,
        ("vo", Kind.GL, 8): 8,
        ("qk", Kind.GL, 8): 8,
        ("ch", Kind.PERM, 128): 2,
        ("heads", Kind.NODES, 4): 2,
    },
    "mixtral": {
        ("residual", Kind.O, 32): 1,
        ("vo", Kind.GL, 8): 4,
        ("qk", Kind.C, 2): 16,
        ("ch", Kind.PERM, 40): 8,
        ("heads", Kind.NODES, 3): 2,
        ("experts", Kind.NODES, 4): 2,
    },
    "gemma2": {
        ("residual", Kind.PERM, 32): 1,
        ("vo", Kind.GL, 8): 4,
        ("qk", Kind.C, 2): 16,
        ("ch", Kind.PERM, 40): 2,
        ("heads", Kind.NODES, 3): 2,
    },
}


@pytest.mark.parametrize("kind", GROUPS)
def test_the_groups_are_those_that_the_theory_names(kind: str) -> None:
    certificate = certified(kind)
    assert certificate.passed and not certificate.refuted and not certificate.unseen
    assert found(certificate) == GROUPS[kind]


def test_gains_fold_without_a_declaration_and_post_norms_stay() -> None:
    assert len(derived("llama").gains) == 5 and not derived("llama").unfolded
    stays = {n for n in derived("gemma2").gains if "post_" in n}
    assert derived("gemma2").unfolded == stays and len(stays) == 4
    assert set(derived("gemma2").gains.values()) == {1.0}  # 1 + w


def test_heads_and_pairs_have_as_many_scales_as_the_null_space_says() -> None:
    scales = derived("llama").scales  # 32 pairs, 40 channels × 2, 32 × 5 gains, 8 × 8 values
    assert scales.free_scales == 32 + 80 + 5 * 32 + 64 and scales.free_signs == 368


@pytest.mark.parametrize("kind", ["ministral3", "olmo", "gpt_oss", "gemma2", "mistral", "smollm3"])
def test_positions_beyond_every_length_and_loud_inputs_are_exact(kind: str) -> None:
    """Queries scaled by position, clipped values, sinks, soft caps, windows, layers without positions."""
    certificate = certified(kind)
    assert certificate.passed
    assert "700 positions" in certificate.errors and "weights × 30" in certificate.errors


def test_queries_scaled_by_position_are_exact_at_5000_tokens() -> None:
    small = made("ministral3")
    probe = Probe("5000 positions", small.tokens(1, 5000, 9))
    certificate = certify(small.model, derived("ministral3"), [probe])
    assert certificate.errors["5000 positions"] <= TOLERANCE


def test_a_group_that_is_too_large_is_refuted_and_named() -> None:
    """A rotation of channels before an elementwise function is wrong, and nothing else suffers from it."""
    own = derived("llama")
    false = tuple(replace(b, kind=Kind.O) if b.name == "ch.1" else b for b in own.blocks)
    small = made("llama")
    probe = Probe("unseen", small.tokens(4, 11, 101))
    certificate = certify(small.model, replace(own, blocks=false), [probe])
    assert (
        set(certificate.refuted) == {"ch.1 O"}
        and "moves the outputs" in certificate.refuted["ch.1 O"]
    )
    assert certificate.proposed > 1e-3 and certificate.passed
    assert ("residual", Kind.O, 32) in found(certificate)


def test_a_change_that_changes_nothing_proves_nothing() -> None:
    """An expert that no probe reaches: its control does not fail, so its space is dropped and named."""
    small = made("mixtral")
    model = copy.deepcopy(small.model)
    for name, p in model.named_parameters():
        if "layers.1.mlp.gate" in name:
            p.data[2:] = p.data[
                :1
            ]  # two experts have equal scores: only the first two are ever chosen
    probe = Probe("one token", small.tokens(1, 1, 5))
    certificate = certify(model, derived("mixtral"), [probe])
    assert any("nothing is proven" in why for why in certificate.refuted.values())


def test_every_axis_that_a_block_names_is_changed_by_a_step() -> None:
    for kind in GROUPS:
        plan = Plan.of(derived(kind))
        assert not plan.broken
        for block in derived(kind).blocks:
            stepped = {s.axis for s in plan.steps if s.block is block}
            gains = {axis for axis in block.where if axis[0] in derived(kind).gains}
            stacks = {a for a in block.where if block.kind is Kind.NODES and "experts" in a[0]}
            assert block.where - gains - stacks <= stepped


def test_leaving_out_one_axis_of_the_stream_moves_the_outputs() -> None:
    """The mutation that a certificate must catch: a reader that was forgotten."""
    small, own = made("llama"), derived("llama")
    trial = Trial(small.model, own, [Probe("unseen", small.tokens(4, 11, 101))], 0)
    stream = [b for b in own.blocks if b.stem == "residual"]
    element = trial.element(stream, False)
    for axis in sorted(stream[0].where):
        if axis[0] not in own.gains:
            assert trial.error(trial.changed(element, lambda s, a=axis: s.axis != a), 0) > 1e-6


def test_folding_alone_leaves_the_outputs() -> None:
    for kind in GROUPS:
        assert certified(kind).folding <= TOLERANCE


def test_the_model_is_left_as_it_was() -> None:
    small = made("mixtral")
    before = {n: p.clone() for n, p in small.model.named_parameters()}
    derived.__wrapped__("mixtral")
    certified.__wrapped__("mixtral")
    assert all(torch.equal(p, before[n]) for n, p in small.model.named_parameters())


def test_an_empty_element_changes_nothing() -> None:
    small, own = made("llama"), derived("llama")
    trial = Trial(small.model, own, [], 0)
    changed = trial.changed(Element({}, {}, frozenset(), {}))
    example = small.tokens(2, 7, 3)
    assert torch.allclose(outputs(changed, example), outputs(small.model, example), atol=1e-12)


def test_a_decay_between_blocks_longer_than_what_was_traced_is_no_space_of_its_own() -> None:
    """MiniMax's decay multiplies zeros in the first block of 256 tokens; what one weight carries alone says nothing."""
    certificate = certified("minimax")
    assert certificate.passed and not certificate.refuted and certificate.error <= TOLERANCE
    assert found(certificate)["ch", Kind.PERM, 40] == 8
    assert all(len(b.where) > 1 for b in certificate.blocks if b.kind is Kind.PERM)
