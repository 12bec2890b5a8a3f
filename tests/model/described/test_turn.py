"""Weights turned by the text alone: the logits stay with all spaces at once, and move when one side is left out."""

from __future__ import annotations

import copy

import pytest
import torch
from derive_models import tokens
from described import KINDS, described

from invariance.core.errors import InputError
from invariance.model.derive.certify import CONTROL, TOLERANCE, distance, outputs
from invariance.model.described import text
from invariance.model.described.accept import accept
from invariance.model.described.description import Kind
from invariance.model.described.elements import elements
from invariance.model.described.turn import sides, turn


@pytest.mark.parametrize("kind", KINDS)
def test_all_spaces_at_once_leave_the_logits_and_every_space_has_a_control(kind):
    model, description = described(kind)
    found = accept(
        copy.deepcopy(model), text.read(text.write(description)), [tokens(3, 11, seed=7)]
    )
    assert found.error <= TOLERANCE
    assert found.refuted == {}
    assert found.unproven == []


def test_turning_changes_every_weight_of_a_space():
    model, description = described("gpt_neox")
    turned = copy.deepcopy(model)
    turn(turned, description, elements(description))
    still = {
        n
        for (n, p), q in zip(model.named_parameters(), turned.parameters(), strict=True)
        if torch.equal(p, q)
    }
    assert still == set()


@pytest.mark.parametrize("kind", ["gpt_neox", "mixtral"])
def test_a_fused_axis_has_a_side_for_each_of_its_parts(kind):
    model, description = described(kind)
    probe = tokens(3, 11, seed=7)
    reference = outputs(model, probe)
    fused = [
        s
        for name in ("qk@0", "vo@0", "ch@0")
        for s in sides(description, name)
        if "norm" not in s.parameter
    ]
    assert len({(s.parameter, s.space, s.powers) for s in fused}) == len(fused) >= 6
    for side in fused:
        turned = copy.deepcopy(model)
        turn(turned, description, elements(description, only=[side.space]), side)
        assert distance(reference, outputs(turned, probe)) > CONTROL, side


def test_a_wrong_layout_is_refuted_and_named():
    model, description = described("llama")
    wrong = text.read(
        text.write(description).replace("j<2{i<2{vo@[8j:+8]}}", "j<2{i<2{vo@[8i:+8]}}")
    )
    found = accept(copy.deepcopy(model), wrong, [tokens(3, 11, seed=7)])
    assert list(found.refuted) == ["vo@0"]
    assert found.error <= TOLERANCE
    assert "vo@0" not in found.description.flat().spaces
    assert "qk@0" in found.description.flat().spaces


def test_of_a_space_with_wrong_scales_only_the_scales_go():
    model, description = described("llama")
    wrong = text.read(text.write(description).replace("ch@^-1", "ch@^-2,1"))
    found = accept(copy.deepcopy(model), wrong, [tokens(3, 11, seed=7)])
    assert list(found.refuted) == ["scales of ch@0"]
    assert found.description.flat().spaces["ch@1"].kind is Kind.PERM
    assert found.description.flat().spaces["ch@1"].scales == ""
    assert found.error <= TOLERANCE


def test_a_tie_is_undone_first():
    model, description = described("llama")
    tied = copy.deepcopy(model)
    tied.lm_head.weight = tied.model.embed_tokens.weight
    with pytest.raises(InputError, match="one parameter"):
        turn(tied, description, elements(description))
