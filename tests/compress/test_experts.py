"""Experts that go, whole: cut equals never chosen, the least useful first, widths inside them in the same budget."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from undeclared import IDS, cache_of_layouts, cut, differs, made, model_of  # noqa: F401 - a fixture is imported

from invariance.calibrate.experts import Added
from invariance.calibrate.moment import Moment
from invariance.compress.derived.cut import carry_out
from invariance.compress.derived.plan import derived_plan
from invariance.core.errors import CertificateError, InputError
from invariance.io.data import Tokens
from invariance.model.derive.certify import TOLERANCE
from invariance.model.narrow.experts import NeverChosen
from invariance.recipe.recipe import Recipe, load_recipe

MOE = Path(__file__).parents[2] / "recipes" / "moe.yaml"
EXPERTS = {
    "spaces": "experts",
    "rotate": "reap",
    "select": {"uniform": {"width": 3}},
    "slice": "truncate",
}
CHANNELS = {
    "spaces": "mlp",
    "rotate": "permute",
    "select": {"uniform": {"width": 16}},
    "slice": "least_squares",
}


@pytest.mark.parametrize("kind", ["mixtral", "olmoe", "gpt_oss"])
def test_experts_and_channels_go_and_plain_transformers_reloads(kind: str, tmp_path: Path) -> None:
    found, model = made(kind, EXPERTS, CHANNELS), model_of(kind)[0]
    assert found.certificate.passed and found.error <= TOLERANCE
    assert found.cut is not None and {c.value for c in found.cut.changes} == {3, 16}
    small = found.model.float()
    small.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(model)
    with torch.no_grad():
        assert differs(again(IDS[:2]).logits, small(IDS[:2]).logits) < 1e-5
        assert differs(small(IDS[:2]).logits, model(IDS[:2]).logits) > 1e-4
    written = [
        again.generate(IDS[:2, :5], max_new_tokens=5, do_sample=False, use_cache=c)
        for c in (False, True)
    ]
    assert torch.equal(*written)


@pytest.mark.parametrize("kind", ["deepseek_v2", "ernie4_5_moe"])
def test_experts_go_where_scores_are_computed_on_a_copy_or_corrected(kind: str) -> None:
    """One copies its router's weight to float32 first; the other adds corrections to scores that are no longer minus
    infinity."""
    found = made(kind, EXPERTS)
    assert found.error <= TOLERANCE and not found.why
    assert found.cut is not None and [c.value for c in found.cut.changes] == [3]


def test_a_model_that_still_chooses_what_went_is_told_from_the_cut_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def idle(self: NeverChosen, *_: Any) -> None:
        super(NeverChosen, self).__init__()
        self.routers = {}

    monkeypatch.setattr(NeverChosen, "__init__", idle)
    with pytest.raises(CertificateError, match=r"differs by .* from the one whose coordinates are"):
        made("olmoe", EXPERTS)


def test_scores_are_what_experts_add_to_the_tokens_that_choose_them() -> None:
    """Computed a second time from what the experts' module is given, expert by expert."""
    found, model = made("olmoe", EXPERTS), copy.deepcopy(model_of("olmoe")[0])
    given: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    for n, layer in enumerate(model.model.layers):
        layer.mlp.experts.register_forward_pre_hook(
            lambda _, a, n=n: given.__setitem__(f"experts.{n}", a)
        )
    with torch.no_grad():
        model(IDS)
    for name, (x, chosen, weight) in given.items():
        experts = model.model.layers[int(name[-1])].mlp.experts
        scores = []
        for e in range(4):
            token, place = (chosen == e).nonzero(as_tuple=True)
            gate, up = (x[token] @ experts.gate_up_proj[e].T).chunk(2, -1)
            out = (experts.act_fn(gate) * up) @ experts.down_proj[e].T
            scores.append(float((out.norm(dim=-1) * weight[token, place]).mean()))
        wanted = np.sort(scores)[::-1]
        np.testing.assert_allclose(found.spectra[name][0].numpy(), wanted, rtol=1e-4)


def test_fewer_experts_than_a_token_takes_are_refused() -> None:
    with pytest.raises(InputError, match="a token takes 2 experts"):
        made("olmoe", {**EXPERTS, "select": {"uniform": {"width": 1}}})


def test_readers_cannot_make_up_for_experts() -> None:
    with pytest.raises(InputError, match="'least_squares' is made for"):
        made("olmoe", {**EXPERTS, "slice": "least_squares"})


@pytest.fixture(scope="module")
def trained() -> PreTrainedModel:
    """Three experts of four are enough for a text of two alphabets: a step in either takes the next letter or the one after."""
    torch.manual_seed(0)
    model = copy.deepcopy(model_of("mixtral")[0]).train().requires_grad_()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(150):
        ids = letters(16, seed=step)
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


def letters(count: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    steps = torch.randint(1, 3, (count, 24), generator=g).cumsum(1)
    half = torch.randint(0, 2, (count, 1), generator=g)
    return 3 + steps % 24 + 24 * half


def loss(model: PreTrainedModel) -> float:
    ids = letters(32, seed=10_000)
    with torch.no_grad():
        return float(model.float()(ids, labels=ids).loss)


def test_of_a_trained_model_one_budget_pays_for_experts_and_their_width(
    trained: PreTrainedModel,
) -> None:
    recipe = load_recipe(MOE, ["model=tiny", "evaluate=null", "budget.parameters=0.8"])
    layout = model_of("mixtral")[1]
    found = cut(trained, layout, recipe, letters(16, seed=9_999))
    total = sum(p.numel() for p in trained.parameters())
    assert sum(p.numel() for p in found.model.parameters()) <= 0.8 * total
    assert found.widths["experts.0"] < 4 and found.widths["mlp.0"] < layout.spaces["mlp.0"].dim
    assert loss(trained) < loss(found.model) < math.log(48)  # a uniform guess over the letters


def test_the_experts_that_add_least_are_those_to_lose(
    trained: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, ids = model_of("mixtral")[1], letters(16, seed=9_999)
    step = {**EXPERTS, "select": {"uniform": {"width": 2}}}
    recipe = Recipe.from_dict({"model": "tiny", "calibrate": {"data": "t.npy"}, "steps": [step]})
    best = loss(cut(trained, layout, recipe, ids).model)

    def reverse(self: Added) -> dict[str, Moment]:
        return {n: Moment(1 / (m.total + 1e-6), m.count) for n, m in measured(self).items()}

    measured = Added.moments
    monkeypatch.setattr(Added, "moments", reverse)
    assert best < loss(cut(trained, layout, recipe, ids).model)


def test_a_space_that_stays_as_it_is_beside_one_that_moves_fails_no_certificate() -> None:
    still = {"spaces": "mlp", "rotate": "identity", "select": {"uniform": {"width": 16}}}
    found = made("olmoe", EXPERTS, {**still, "slice": "truncate"})
    assert found.certificate.passed and found.certificate.negative_control > 1e-4


@pytest.mark.parametrize("select", ["global_energy", "dynamic_programming"])
def test_scores_and_energies_are_not_compared(select: str) -> None:
    of = {select: {"of": "absolute"}}
    steps = [{**EXPERTS, "select": of}, {**CHANNELS, "select": of}]
    asked = {"model": "tiny", "calibrate": {"data": "t.npy"}, "budget": {"parameters": 0.8}}
    model, layout = model_of("olmoe")
    with pytest.raises(InputError, match="compares the energies of all its spaces as they are"):
        derived_plan(Recipe.from_dict(asked | {"steps": steps}), model.config, layout)


def test_what_experts_would_measure_wrongly_is_refused() -> None:
    model, layout = model_of("olmoe")
    skipping = {"model": "tiny", "calibrate": {"data": "t.npy", "skip": 4}, "steps": [EXPERTS]}
    with pytest.raises(InputError, match="which tokens reach an expert is not followed"):
        derived_plan(Recipe.from_dict(skipping), model.config, layout)
    plan = derived_plan(
        Recipe.from_dict(skipping | {"calibrate": {"data": "t.npy"}}), model.config, layout
    )
    padded = torch.ones_like(IDS, dtype=torch.bool)
    padded[0, 20:] = False
    with pytest.raises(InputError, match="some windows are padded"):
        carry_out(model, plan, Tokens(IDS, padded, ()))


def test_another_rotator_is_named_where_one_does_not_serve() -> None:
    with pytest.raises(InputError, match=r"is made for .*Use another rotator .* \(reap\)"):
        made("olmoe", {k: v for k, v in EXPERTS.items() if k != "rotate"})
    with pytest.raises(InputError, match="a router takes experts one by one"):
        made("olmoe", {**EXPERTS, "rotate": {"pca": {"of": "raw"}}})
