"""Query/key heads: which pairs and directions go, what still turns the rest, what the cache holds, what stock loads."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from folders import VOCABULARY, model_of, save_tokens
from hypothesis import given
from hypothesis import strategies as st
from projected import project
from sliced import taken
from tiny import canonical_copy, cut, elements, rotations, seeds, tiny, tokens
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from invariance.calibrate.enter import enter
from invariance.calibrate.moments import Moment, Moments
from invariance.calibrate.statistic import Statistic
from invariance.compress.pipeline import slice_model
from invariance.compress.planner import plan
from invariance.compress.sliced import Sliced
from invariance.core.change import Change
from invariance.core.dense import compose
from invariance.core.errors import InputError, InvarianceError
from invariance.core.group import Group
from invariance.core.space import Space
from invariance.io.checkpoint import InvarianceForCausalLM
from invariance.io.data import Tokens
from invariance.method.interfaces import Slicer, find
from invariance.model import attention as attending
from invariance.model import modules
from invariance.model.canonical import canonicalize
from invariance.model.families import architecture
from invariance.model.labels import label
from invariance.model.reparametrize import attention_of, reparametrize
from invariance.model.verify import logits, relative_error, tolerance
from invariance.model.working import Whole
from invariance.recipe.recipe import Recipe
from invariance.run.outcome import Outcome, outcome

FAR = 1e5  # times the tolerance
IDS = torch.arange(1, 25)[None] % VOCABULARY
LONG = torch.randint(
    1, VOCABULARY, (1, 500), generator=torch.Generator().manual_seed(0)
)  # beyond 320 positions


def qk(width: int | None = 4, **options: Any) -> dict[str, Any]:
    rotate: Any = {"rope_pairs": options} if options else "rope_pairs"
    return {"spaces": "qk", "rotate": rotate} | (
        {"select": {"uniform": {"width": width}}} if width else {}
    )


def vo(width: int = 4) -> dict[str, Any]:
    return {"spaces": "vo", "rotate": "head_svd", "select": {"uniform": {"width": width}}}


@pytest.fixture(scope="module", autouse=True)
def data(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("heads")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INVARIANCE_CACHE", str(root / "cache"))
        patch.chdir(root)
        save_tokens(root / "tokens.npy")
        yield


@cache
def dense(family: str = "llama", **options: Any) -> PreTrainedModel:
    return model_of(family, **{"tie_word_embeddings": False} | options)


def compressed(model: PreTrainedModel, *steps: dict[str, Any], **keys: Any) -> Outcome:
    calibrate = {"data": "tokens.npy", "dtype": "float32"}
    recipe = Recipe.from_dict({"model": "m", "calibrate": calibrate, "steps": list(steps)} | keys)
    return outcome(model, recipe, evaluate=False)


def in_our_modules(model: PreTrainedModel, recipe: dict[str, Any]) -> Sliced:
    """What slicing gives, before it takes a stock form."""
    ids = torch.from_numpy(np.load("tokens.npy"))
    tokens = Tokens(ids, torch.ones_like(ids, dtype=torch.bool))
    return slice_model(model, plan(Recipe.from_dict(recipe), model.config), tokens)


# Frequencies move with their pairs


def sliced(family: str = "llama", **options: Any) -> tuple[PreTrainedModel, Tensor, float]:
    """A model with four heads on two KV heads, half its pairs cut; what it must compute; the tolerance."""
    model = tiny(family, **{"head_dim": 8, "num_attention_heads": 4} | options)
    made, layout = canonical_copy(model, fold=False, tie="untie")
    reference, _ = canonical_copy(model, fold=False, tie="untie")
    names = layout.select(["qk"])
    changes = {
        n: cut(c, 4, layout.spaces[n])
        for n, c in rotations(elements(layout, names, seed=1)).items()
    }
    reparametrize(made, layout, changes)
    project(reference, layout, changes)
    return made, logits(reference, tokens()), tolerance(torch.float64, layout.depth)


def attentions(model: PreTrainedModel) -> list[modules.Attention]:
    return [m for m in model.modules() if isinstance(m, modules.Attention)]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_a_cut_model_turns_every_pair_by_its_own_frequency_and_any_other_is_noticed(family):
    model, reference, bound = sliced(family)
    assert relative_error(reference, logits(model, tokens())) <= bound
    assert {s.rotary for n, s in label(model).spaces.items() if n.startswith("qk")} == {4}
    for attention in attentions(model):
        assert attention.pairs.shape == (2, 2) and not attention.pairs[0].equal(attention.pairs[1])
    pairs = attentions(model)[0].pairs
    for wrong in (pairs.flip(0), pairs.flip(1), (pairs + 1) % 4, torch.arange(2).repeat(2, 1)):
        attentions(model)[
            0
        ].pairs = wrong  # another head's, another pair's, the next ones, those at the place itself
        assert relative_error(reference, logits(model, tokens())) > FAR * bound
    attentions(model)[0].pairs = pairs
    assert relative_error(reference, logits(model, tokens())) <= bound


def test_frequencies_that_stay_behind_a_rotation_are_noticed():
    model = tiny("llama", head_dim=8)
    rotated, layout = canonical_copy(model, fold=False, tie="untie")
    reference, bound = logits(rotated, tokens()), tolerance(torch.float64, layout.depth)
    reparametrize(rotated, layout, rotations(elements(layout, layout.select(["qk"]), seed=1)))
    assert relative_error(reference, logits(rotated, tokens())) <= bound
    for attention in attentions(rotated):
        attention.pairs = None
    assert relative_error(reference, logits(rotated, tokens())) > FAR * bound


def test_query_heads_turned_as_those_of_another_key_head_are_noticed(monkeypatch):
    model, reference, bound = sliced()
    assert relative_error(reference, logits(model, tokens())) <= bound
    monkeypatch.setattr(
        attending, "spread", lambda x, heads: x.repeat(1, heads // x.shape[1], 1, 1)
    )
    assert relative_error(reference, logits(model, tokens())) > FAR * bound


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_scores_stay_divided_by_the_root_of_the_original_width(family):
    if family == "llama":
        model, reference, bound = sliced()
    else:
        made = tiny("opt")
        model, layout = canonical_copy(made, fold=False, tie="untie")
        twin, _ = canonical_copy(made, fold=False, tie="untie")
        changes = {
            n: cut(c, 2) for n, c in rotations(elements(layout, layout.select(["qk"]), 1)).items()
        }
        reparametrize(model, layout, changes)
        project(twin, layout, changes)
        reference, bound = logits(twin, tokens()), tolerance(torch.float64, layout.depth)
    assert relative_error(reference, logits(model, tokens())) <= bound
    for attention in attentions(model):
        attention.scaling *= 2**0.5  # of half the width
    assert relative_error(reference, logits(model, tokens())) > FAR * bound


@pytest.mark.parametrize("together", [True, False])
def test_frequencies_go_with_the_groups_that_move(together, monkeypatch):
    def error() -> float:
        model, layout = canonical_copy(
            tiny("llama", head_dim=8, num_key_value_heads=4), fold=False, tie="untie"
        )
        reference = logits(model, tokens())
        changes = rotations(elements(layout, layout.select(["qk", "heads"]), seed=1))
        for part in [changes] if together else [{n: c} for n, c in changes.items()]:
            reparametrize(model, label(model), part)
        return relative_error(reference, logits(model, tokens())) / tolerance(
            torch.float64, layout.depth
        )

    assert error() <= 1
    keep = modules.Attention.keep_groups
    stay = lambda self, kept: keep(self, torch.arange(len(kept)))  # noqa: E731
    monkeypatch.setattr(modules.Attention, "keep_groups", stay)
    assert error() > FAR


@given(seed=seeds)
def test_one_cut_after_another_is_their_product(seed):
    model, layout = canonical_copy(tiny("llama", head_dim=8), fold=False, tie="untie")
    twin, _ = canonical_copy(tiny("llama", head_dim=8), fold=False, tie="untie")
    space = layout.spaces["qk.0"]
    first = cut(Change.rotation(space.element(seed)), 6, space)
    reparametrize(model, layout, {"qk.0": first})
    narrower = label(model).spaces["qk.0"]
    second = cut(Change.rotation(narrower.element(seed + 1)), 4, narrower)
    reparametrize(model, label(model), {"qk.0": second})
    both = Change(compose(first.encode, second.encode), compose(first.decode, second.decode))
    reparametrize(twin, layout, {"qk.0": both})
    assert relative_error(logits(twin, tokens()), logits(model, tokens())) <= tolerance(
        torch.float64, 4
    )
    assert attention_of(model, layout, "qk.0").pairs.equal(attention_of(twin, layout, "qk.0").pairs)


# What is measured, and the choice


def measured(model: PreTrainedModel) -> tuple[Any, Moments, dict[str, Tensor], dict[str, Tensor]]:
    """A layout, moments of queries and keys, and the queries and keys themselves, by space."""
    layout = canonicalize(model, fold=False)
    queries: dict[str, Tensor] = {}
    keys: dict[str, Tensor] = {}
    for n in layout.select(["qk"]):
        a = attention_of(model, layout, n)
        a.q.register_forward_hook(
            lambda _m, _a, y, n=n: queries.__setitem__(n, y.detach().flatten(0, 1))
        )
        a.k.register_forward_hook(
            lambda _m, _a, y, n=n: keys.__setitem__(n, y.detach().flatten(0, 1))
        )
    ids = tokens(3, batch=4, length=12)
    parts = Whole(model, layout)
    batches = enter(parts, [(ids, torch.ones_like(ids, dtype=torch.bool))], torch.float64)
    wanted = dict.fromkeys(layout.select(["qk"]), frozenset({Statistic.RAW, Statistic.QUERIES}))
    moments = taken(parts, batches, wanted, torch.float64)
    logits(model, ids)
    return layout, moments, queries, keys


@pytest.mark.parametrize("family", ["llama", "opt", "phi"])
def test_queries_are_those_that_meet_a_key_head(family):
    layout, moments, queries, keys = measured(tiny(family).double())
    for name in layout.select(["qk"]):
        space = layout.spaces[name]
        q = queries[name].unflatten(-1, (space.copies, -1, space.dim))  # n c r d
        k = keys[name].unflatten(-1, (space.copies, space.dim))
        C = torch.einsum("ncrd,ncre->cde", q, q) / len(q)
        torch.testing.assert_close(moments.second(space, Statistic.QUERIES), C)
        torch.testing.assert_close(
            moments.second(space), torch.einsum("ncd,nce->cde", k, k) / len(k)
        )
        if family == "llama":  # the control: heads dealt out in turn
            dealt = queries[name].unflatten(-1, (-1, space.copies, space.dim))
            other = torch.einsum("nrcd,nrce->cde", dealt, dealt) / len(q)
            assert not torch.allclose(moments.second(space, Statistic.QUERIES), other)


@pytest.mark.parametrize("per", ["head", "layer"])
@pytest.mark.parametrize(
    "options",
    [
        {"head_dim": 8},
        {
            "hidden_size": 32,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
            },
        },
    ],
)
def test_pairs_go_by_what_they_add_to_the_scores(per, options):
    family = "phi" if "hidden_size" in options else "llama"
    layout, moments, queries, keys = measured(tiny(family, **options).double())
    space = layout.spaces["qk.1"]
    h, r = space.rotary // 2, space.rotary
    basis = find("rotate", "rope_pairs")(per=per).fit(space, moments)
    q = queries["qk.1"].unflatten(-1, (space.copies, -1, space.dim)).numpy()
    k = keys["qk.1"].unflatten(-1, (space.copies, space.dim)).numpy()
    score = np.zeros((space.copies, h))
    for c in range(space.copies):
        for j in range(h):
            lengths = (q[:, c, :, j] ** 2 + q[:, c, :, j + h] ** 2).sum(-1)
            score[c, j] = lengths.mean() * (k[:, c, j] ** 2 + k[:, c, j + h] ** 2).mean() / 4
    if per == "layer":
        score[:] = score.mean(0)
    for c in range(space.copies):
        order = np.argsort(-score[c], kind="stable")
        for i, j in enumerate(order):
            assert basis.A.matrix()[c, j, i] == basis.A.matrix()[c, j + h, i + h] == 1
        np.testing.assert_allclose(basis.energy[c, space.spared :], np.repeat(score[c][order], 2))
    assert basis.A.matrix()[:, r:, r:].equal(
        torch.eye(space.spared, dtype=torch.float64).expand_as(basis.A.matrix()[:, r:, r:])
    )
    assert (
        basis.A.matrix()[:, :r].abs().sum(1).amax() == 1
        and basis.A.matrix()[:, r:, :r].abs().sum() == 0
    )


@given(seed=seeds, per=st.sampled_from(["head", "layer"]))
def test_pairs_go_one_by_one_where_the_output_loses_least_and_energies_are_what_it_loses(seed, per):
    g = torch.Generator().manual_seed(seed)
    space = Space("qk.0", "qk", 12, Group.ROTARY, 2, 8)
    m = torch.randn(2, 12, 30, generator=g, dtype=torch.float64)
    M = m @ m.mT
    basis = find("rotate", "rope_pairs")(per=per, metric="fisher").fit(
        space, Moments({("qk.0", Statistic.TAYLOR): Moment(M, 1)})
    )

    def loss(M: Tensor, gone: set[int]) -> float:
        dims = [d for j in gone for d in (j, j + 4)]
        return float(M[dims][:, dims].sum()) / 2

    for c in range(2):
        mean = M[c] if per == "head" else M.mean(0)
        order = basis.A.matrix()[c, :4, :4].argmax(0).tolist()
        gone: set[int] = set()
        worst = 0.0
        for i in reversed(range(4)):
            assert loss(mean, gone | {order[i]}) == min(
                loss(mean, gone | {j}) for j in range(4) if j not in gone
            )
            gone.add(order[i])
            worst = max(worst, loss(mean, gone))
            assert basis.energy[c, 4 + 2 * i :].sum() == pytest.approx(worst)
        apart = sum(loss(mean, {j}) for j in range(4))  # the control: pairs each on its own
        assert basis.energy[c, 4:].sum() != pytest.approx(apart)
    assert bool(
        (basis.energy[:, :4] >= basis.energy.amax(1, keepdim=True) - 1e-12).all()
    )  # dims that positions spare


@given(seed=seeds)
def test_the_choice_of_pairs_is_the_same_in_any_basis_of_the_group(seed):
    """Complex scales on a head, and pairs in another order, change neither which pairs go nor their energies."""
    g = torch.Generator().manual_seed(seed)
    space = Space("qk.0", "qk", 8, Group.ROTARY, 2, 8)
    x, y = (torch.randn(2, 8, 24, generator=g, dtype=torch.float64) for _ in range(2))
    A = space.element(seed).matrix()
    D = Change.rotation(A).decode.matrix()
    rotator = find("rotate", "rope_pairs")()

    def fit(q: Tensor, k: Tensor) -> Any:
        known = {
            (space.name, s): Moment(m @ m.mT, 24)
            for s, m in ((Statistic.QUERIES, q), (Statistic.RAW, k))
        }
        return rotator.fit(space, Moments(known))

    there, here = fit(D.mT @ x, A.mT @ y), fit(x, y)
    torch.testing.assert_close(there.energy, here.energy)
    there = cut(Change.rotation(A @ there.A.matrix()), 4, space)
    here = cut(Change.rotation(here.A), 4, space)
    torch.testing.assert_close(
        there.encode.matrix() @ there.decode.matrix().mT,
        here.encode.matrix() @ here.decode.matrix().mT,
    )
    assert not torch.allclose(
        fit(x, A.mT @ y).energy, fit(x, y).energy
    )  # the control: half of a change


@given(seed=seeds, d=st.integers(2, 7), k=st.integers(1, 6))
def test_no_map_of_its_rank_keeps_more_of_the_scores_than_qk_svd(seed, d, k):
    k = min(k, d)
    g = torch.Generator().manual_seed(seed)
    space = Space("qk.0", "qk", d, Group.INVERTIBLE, 2)
    q, y = (torch.randn(2, d, 3 * d, generator=g, dtype=torch.float64) for _ in range(2))
    Cq, Ck = q @ q.mT, y @ y.mT
    known = Moments(
        {("qk.0", Statistic.QUERIES): Moment(Cq, 1), ("qk.0", Statistic.RAW): Moment(Ck, 1)}
    )
    basis = find("rotate", "qk_svd")().fit(space, known)
    change = find("slice", "truncate")().cut(space, basis, k, known)

    def lost(P: Tensor) -> Tensor:
        """E|qᵀ(I − P)k|² = tr (I − P)ᵀ C_q (I − P) C_k."""
        R = torch.eye(d, dtype=P.dtype) - P
        return torch.einsum("cij,cik,ckl,clj->c", R, Cq, R, Ck)

    P = change.decode.matrix() @ change.encode.matrix().mT
    torch.testing.assert_close(
        lost(P), basis.energy[:, k:].sum(-1), atol=1e-8 * float(basis.energy.sum()), rtol=1e-8
    )
    middle = torch.linalg.cholesky(Cq).mT @ torch.linalg.cholesky(
        Ck
    )  # Eckart and Young, by other roots
    tail = torch.linalg.svdvals(middle)[:, k:].square().sum(-1)
    torch.testing.assert_close(lost(P), tail, atol=1e-8 * float(basis.energy.sum()), rtol=1e-8)
    balanced = torch.diag_embed(basis.energy.sqrt())
    D = Change.rotation(basis.A).decode.matrix()
    for new in (basis.A.matrix().mT @ Ck @ basis.A.matrix(), D.mT @ Cq @ D):
        assert (new - balanced).abs().amax() <= 1e-7 * balanced.amax()
    if k < d:  # the control: principal axes of the keys alone
        axes = find("slice", "truncate")().cut(
            space, find("rotate", "pca")().fit(space, known), k, known
        )
        assert bool(
            (lost(axes.decode.matrix() @ axes.encode.matrix().mT) > tail * (1 + 1e-6)).any()
        )


# Through a recipe


@pytest.mark.parametrize("order", ["oneshot", "sequential", "dense_target"])
@pytest.mark.parametrize("per", ["head", "layer", "model"])
def test_layers_and_heads_share_a_choice_where_they_are_told_to(per: str, order: str) -> None:
    recipe = {
        "calibrate": {"data": "tokens.npy"},
        "steps": [qk(4, per=per)],
        "order": order,
        "model": "m",
    }
    model = dense(head_dim=16)
    made = in_our_modules(model, recipe)
    pairs = [a.pairs for a in attentions(made.model)]
    assert len(pairs) == 2 and all(p.shape == (2, 2) for p in pairs)
    assert all(p[0].equal(p[1]) for p in pairs) == (per != "head")
    assert pairs[0].equal(pairs[1]) == (per == "model")
    assert made.widths == {"qk.0": 4, "qk.1": 4}
    assert made.certificate.passed


def test_what_all_layers_share_is_what_adds_most_to_the_scores_of_all() -> None:
    layout, moments, _, _ = measured(tiny("llama", head_dim=8).double())
    spaces = [layout.spaces[n] for n in layout.select(["qk"])]
    rotator = find("rotate", "rope_pairs")(per="model")
    (unit,) = plan(
        Recipe.from_dict(
            {"model": "m", "calibrate": {"data": "d"}, "steps": [qk(None, per="model")]}
        ),
        tiny("llama", head_dim=8).config,
    ).units
    assert unit.members == ("qk.0", "qk.1") and unit.fitted.copies == 4
    both = rotator.fit(unit.fitted, moments.beside(unit.members, "qk.0"))
    each = [find("rotate", "rope_pairs")(per="layer").fit(s, moments) for s in spaces]
    summed = sum(
        torch.einsum("dk,k->d", b.A.matrix()[0], b.energy[0].view(4, 2)[:, 0].repeat(2))
        for b in each
    )
    assert both.A.matrix()[0].argmax(0)[:4].equal(summed[:4].argsort(descending=True))
    pooled = rotator.fit(
        spaces[0], moments.pooled(unit.members, "qk.0")
    )  # of sums, which hang on the scales
    assert not torch.allclose(pooled.energy[0], both.energy[0])


def test_a_joint_rotator_that_tells_layers_apart_and_a_slicer_that_reads_moments_are_refused() -> (
    None
):
    @dataclass(frozen=True)
    class Reading(Slicer):
        name = "reading"
        needs = frozenset({Statistic.RAW})

        def cut(self, *_: Any) -> Any: ...

    step = qk(4, per="model")
    recipe = Recipe.from_dict({"model": "m", "calibrate": {"data": "tokens.npy"}, "steps": [step]})
    object.__setattr__(recipe.steps[0], "slice", Reading())
    with pytest.raises(
        InputError, match="'reading' reads moments, and the spaces that share the basis"
    ):
        plan(recipe, dense().config)

    rotator = find("rotate", "rope_pairs")
    fit = rotator.fit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            rotator, "fit", lambda self, space, moments: fit(rotator(per="head"), space, moments)
        )
        with pytest.raises(InvarianceError, match="gives all layers one basis"):
            compressed(dense(head_dim=16), step)


@pytest.mark.parametrize("order", ["oneshot", "dense_target"])
@pytest.mark.parametrize("family", ["llama", "opt", "phi"])
def test_checkpoints_of_our_own_keep_the_choice_of_every_head(
    family: str, order: str, tmp_path: Path
) -> None:
    keys = qk(6 if family == "phi" else 4) if family != "opt" else qk(4) | {"rotate": "qk_svd"}
    made = compressed(dense(family), keys, vo(5), order=order)
    assert isinstance(made.model, InvarianceForCausalLM)
    made.model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(made.model, IDS), logits(loaded, IDS))
    assert relative_error(logits(dense(family), IDS), logits(loaded, IDS)) > 1e-4
    out = [
        loaded.generate(IDS[:, :5], max_new_tokens=6, do_sample=False, use_cache=c)
        for c in (True, False)
    ]
    assert torch.equal(*out)
    if family != "opt":
        assert {a.pairs.dtype for a in attentions(loaded)} == {torch.int64}
        wrong = (attentions(loaded)[0].pairs + 1) % (4 if family == "llama" else 2)
        attentions(loaded)[0].pairs = wrong  # the control
        assert relative_error(logits(made.model, IDS), logits(loaded, IDS)) > 1e-4


@pytest.mark.parametrize("family", ["llama", "opt", "phi"])
def test_the_cache_holds_what_the_report_says(family: str) -> None:
    keys = qk(6 if family == "phi" else 4) if family != "opt" else qk(4) | {"rotate": "qk_svd"}
    made = compressed(dense(family), keys, vo(3))
    said = made.report["kv_bytes_per_token"]
    prompt = torch.cat((IDS[:, :7], IDS[:, 7:14]))

    def held(model: PreTrainedModel) -> float:
        out = model.generate(
            prompt, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, pad_token_id=0
        )
        layers = out.past_key_values.layers
        tokens = layers[0].keys.shape[0] * layers[0].keys.shape[2]
        assert tokens == 2 * (out.sequences.shape[1] - 1)
        return (
            sum(
                t.numel() * t.element_size() for layer in layers for t in (layer.keys, layer.values)
            )
            / tokens
        )

    assert held(made.model) == said["sliced"] and held(dense(family)) == said["dense"]
    assert said["sliced"] < said["dense"]


# Stock checkpoints

PLAIN = """
import json, sys
sys.modules["invariance"] = None  # any import of it raises ImportError
import numpy as np, torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder).eval()
ids = torch.from_numpy(np.load(folder + "/ids.npy"))
with torch.no_grad():
    np.save(folder + "/long.npy", model(input_ids=ids).logits.numpy())
    np.save(folder + "/short.npy", model(input_ids=ids[:, :24]).logits.numpy())
options = dict(max_new_tokens=8, do_sample=False)
made = [model.generate(ids[:, :n], use_cache=c, **options).tolist() for n in (5, 316, 400) for c in (True, False)]
json.dump(made, open(folder + "/generated.json", "w"))
"""

ROPES: list[dict[str, Any]] = [
    {"rope_type": "default", "rope_theta": 1e4},
    {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5},
    {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "rope_theta": 1e4,
        "original_max_position_embeddings": 64,
    },
    {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 80},
]


@pytest.mark.parametrize("rope", ROPES, ids=[r["rope_type"] for r in ROPES])
def test_plain_transformers_turns_the_pairs_that_are_left_at_any_length(
    rope: dict[str, Any], tmp_path: Path
) -> None:
    model = model_of("llama", head_dim=16, tie_word_embeddings=False, rope_parameters=rope)
    made = compressed(model, qk(8, per="model"), vo(8), order="dense_target")
    assert made.report["model"]["stock"], made.report["model"]["why_not_stock"]
    assert (
        made.model.config.rope_parameters["rope_type"] == "longrope"
        and made.model.config.head_dim == 8
    )
    made.model.save_pretrained(tmp_path)
    np.save(tmp_path / "ids.npy", LONG.numpy())
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    own = in_our_modules(model, made.report["recipe"]).model  # in float64
    bound = tolerance(torch.float32, 4)
    for name, ids in (("long", LONG), ("short", LONG[:, :24])):
        assert (
            relative_error(logits(own, ids), torch.from_numpy(np.load(tmp_path / f"{name}.npy")))
            <= bound
        )
    with_cache, without = (
        json.loads((tmp_path / "generated.json").read_text())[n::2] for n in (0, 1)
    )
    assert with_cache == without
    rotary = made.model.model.rotary_emb
    before = rotary.inv_freq.clone()
    rotary.inv_freq.mul_(
        1.01
    )  # the control; and what transformers computes anew at a length of its own
    rotary.original_inv_freq = rotary.long_inv_freq = rotary.inv_freq.clone()
    assert relative_error(logits(own, LONG[:, :24]), logits(made.model, LONG[:, :24])) > 10 * bound
    kept = model.model.rotary_emb.inv_freq[attentions(own)[0].pairs[0]]
    torch.testing.assert_close(
        before, kept, rtol=2**-23, atol=0
    )  # no more than the next number in float32


@pytest.mark.parametrize(
    ("model", "steps", "why"),
    [
        ({}, [qk(4), vo(4)], "keep different frequency pairs; one choice for the whole model"),
        ({}, [qk(4, per="layer"), vo(4)], "keep different frequency pairs"),
        ({}, [qk(4, per="model"), vo(6)], "value heads have 6 dims and query/key heads 4"),
        ({}, [qk(4, per="model")], "value heads have 8 dims and query/key heads 4"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            [qk(4, per="model"), vo(4)],
            "frequencies of the type 'dynamic' change with the length",
        ),
    ],
)
def test_choices_that_no_stock_config_holds_say_why(
    model: dict[str, Any], steps: list[Any], why: str
) -> None:
    report = compressed(model_of("llama", tie_word_embeddings=False, **model), *steps).report[
        "model"
    ]
    assert not report["stock"] and why in report["why_not_stock"]


def test_a_stock_form_with_every_space_cut_is_counted_as_planned(tmp_path: Path) -> None:
    stream = {"spaces": "residual", "rotate": "pca", "select": {"uniform": {"width": 24}}}
    mlp = {
        "spaces": "mlp",
        "rotate": "permute",
        "select": {"uniform": {"width": 40}},
        "slice": "least_squares",
    }
    made = compressed(dense(), stream, mlp, qk(4, per="model"), vo(4))
    assert made.report["model"]["stock"], made.report["model"]["why_not_stock"]
    assert made.report["parameters"]["sliced"]["total"] == sum(
        p.numel() for p in made.model.parameters()
    )


# Norms of queries and keys


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("olmo2", "no norm stands in front of 'self_attn'"),
        ("minimax_m2", "norms what all heads give together"),
        ("hunyuan_v1_dense", "norm '.*' reads neither queries nor keys as they come"),
        ("gemma2", "gives other logits"),
    ],
)
def test_a_family_whose_norms_or_scores_cannot_be_declared_is_refused_with_the_reason(
    kind: str, why: str
) -> None:
    own = {"head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    values = own if kind == "hunyuan_v1_dense" else {}
    with pytest.raises(InputError, match=rf"'{kind}'.*{why}"):
        architecture(AutoConfig.for_model(kind, **values))


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_heads_with_norms_of_their_own_have_one_basis_and_one_width(family: str) -> None:
    model, layout = canonical_copy(tiny(family), fold=True, tie="untie")
    space = layout.spaces["qk.0"]
    assert space.group is Group.IDENTITY and [k for k in range(5) if space.fits(k)] == [4]
    stage = f"{layout.edges[0].stage}.attention"
    assert layout.axes[f"{stage}.q_norm.gain"] == layout.axes[f"{stage}.k_norm.gain"]
    with pytest.raises(InvarianceError, match=r"cuts space 'qk\.0' to width 2, and a norm divides"):
        reparametrize(model, layout, {"qk.0": Change.empty(space, 2)})
    base = {"model": "m", "calibrate": {"data": "d"}}
    for step, why in (
        ({"rotate": "qk_svd"}, "rotator 'qk_svd'.*admits 'identity' only, because a norm divides"),
        (
            {"rotate": "identity", "select": {"uniform": {"width": 2}}, "slice": "truncate"},
            "space 'qk.0' cannot be cut, because a norm divides by the length",
        ),
    ):
        recipe = Recipe.from_dict(base | {"steps": [{"spaces": "qk"} | step]})
        with pytest.raises(InputError, match=why):
            plan(recipe, model.config)
    plan(Recipe.from_dict(base | {"steps": [{"spaces": "qk", "rotate": "identity"}]}), model.config)


def test_a_variant_that_norms_its_queries_and_keys_is_refused_with_the_reason() -> None:
    assert canonicalize(tiny("phi"), fold=False)
    with pytest.raises(InputError, match=r"norms queries or keys by a LayerNorm \(.*layernorm"):
        canonicalize(tiny("phi", qk_layernorm=True), fold=False)
