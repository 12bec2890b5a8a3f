"""Shortcuts of low rank: bases that follow one another, what a rank leaves out, what it stores, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import VOCABULARY, model_of, stored_numbers, workplace
from hypothesis import given
from hypothesis import strategies as st
from tiny import canonical_copy, elements, rotations, seeds
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from invariance.calibrate import walk
from invariance.calibrate.batch import Batch
from invariance.calibrate.statistic import Statistic
from invariance.compress import pipeline
from invariance.compress.means import Means
from invariance.compress.pipeline import slice_model
from invariance.compress.planner import plan
from invariance.compress.sliced import Sliced
from invariance.core.change import Change
from invariance.core.errors import InputError
from invariance.core.progress import quiet
from invariance.core.shortcuts import Chain, follow
from invariance.core.space import haar
from invariance.io.checkpoint import layout_of_config
from invariance.io.data import Tokens, load_tokens
from invariance.io.source import live
from invariance.measure.losses import perplexity
from invariance.model.copies import copy_in
from invariance.model.families import architecture
from invariance.model.labels import label
from invariance.model.modules import Stage
from invariance.model.reparametrize import reparametrize
from invariance.model.verify import logits, relative_error, tolerance
from invariance.recipe.recipe import Recipe
from invariance.run.outcome import Outcome, outcome

WIDTH = 24
ENOUGH = 8  # of 32 dims: the rank at which shortcuts are exact
STAGES = {
    "spaces": "residual",
    "segments": "stage",
    "rotate": "pca",
    "select": {"uniform": {"width": WIDTH}},
}
RANDOM = STAGES | {"rotate": "random_orthogonal"}  # bases that no rounding of moments moves
MLP = {
    "spaces": "mlp",
    "rotate": "permute",
    "select": {"uniform": {"width": 40}},
    "slice": "least_squares",
}
ROUNDING = 1e-12  # of sums of a few hundred float64 products, relative
MOVED = 1000  # tolerances that a control must differ by


@pytest.fixture(scope="module", autouse=True)
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with workplace(tmp_path_factory.mktemp("shortcuts"), sequences=16):
        yield


@cache
def dense(family: str = "llama") -> PreTrainedModel:
    return model_of(family, tie_word_embeddings=False) if family == "llama" else model_of(family)


def tokens() -> Tokens:
    return load_tokens("tokens.npy", None, vocab_size=VOCABULARY)


def recipe(*steps: dict[str, Any], **keys: Any) -> Recipe:
    calibrate = {"data": "tokens.npy", "dtype": "float32", "batch": 8}
    return Recipe.from_dict({"model": "m", "calibrate": calibrate, "steps": list(steps)} | keys)


def of_rank(rank: int | str | None, step: dict[str, Any] = STAGES) -> dict[str, Any]:
    return step if rank is None else step | {"shortcuts": {"rank": rank}}


def sliced(asked: Recipe, family: str = "llama") -> Sliced:
    return slice_model(dense(family), plan(asked, dense(family).config), tokens())


def made(asked: Recipe, family: str = "llama") -> Outcome:
    return outcome(dense(family), asked, evaluate=False)


def found(model: PreTrainedModel) -> Tensor:
    return logits(model, tokens().ids[:2])


def exact(layout: Any) -> float:
    return tolerance(torch.float64, layout.depth)


# --- The algebra.


def kept(d: int, k: int, seed: int) -> Change:
    """The first k columns of a random orthogonal matrix."""
    E = haar(d, torch.Generator().manual_seed(seed))[None, :, :k].contiguous()
    return Change(E, E)


def moment(k: int, seed: int) -> Tensor:
    X = torch.randn(3 * k, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return X.mT @ (X * torch.arange(1, 3 * k + 1)[:, None])


@given(seed=seeds, d=st.integers(2, 12), data=st.data())
def test_at_full_rank_a_turned_basis_is_joined_exactly(
    seed: int, d: int, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, d))
    source, target = kept(d, k, seed), kept(d, k, seed + 1)
    turned = follow(source, target, d, moment(k, seed))
    E, E0, F = turned.encode.matrix()[0], target.encode.matrix()[0], turned.entry
    assert F is not None and F.shape == (k, min(k, d - k))
    assert (E @ E.mT - E0 @ E0.mT).abs().max() <= ROUNDING  # what is kept stays the same
    S = source.decode.matrix()[0].mT @ E
    assert (S - (torch.eye(k) - F @ F.mT)).abs().max() <= ROUNDING
    if k > 1:  # as the target was, nothing of the kind holds
        assert (source.decode.matrix()[0].mT @ E0 - (torch.eye(k) - F @ F.mT)).abs().max() > 1e-6


@given(seed=seeds, k=st.integers(1, 6), data=st.data())
def test_what_a_rank_leaves_out_adds_least_to_the_stream(
    seed: int, k: int, data: st.DataObject
) -> None:
    r = data.draw(st.integers(0, k))
    source, target, C = kept(8, k, seed), kept(8, k, seed + 1), moment(k, seed)

    def lost(M: Tensor) -> float:
        return float((M.mT @ C @ M).trace())

    turned = follow(source, target, r, C)
    S, F = source.decode.matrix()[0].mT @ turned.encode.matrix()[0], turned.entry
    whole = follow(source, target, k, C).entry
    assert whole is not None and F is not None
    n = whole.shape[1]
    r = min(r, n)
    assert F.shape == (k, r)
    others = [
        lost(torch.eye(k) - whole[:, list(c)] @ whole[:, list(c)].mT - S)
        for c in combinations(range(n), r)
    ]
    assert lost(torch.eye(k) - F @ F.mT - S) <= min(others) + ROUNDING * lost(torch.eye(k).double())
    assert len(others) < 2 or max(others) > min(others)


def test_turning_bases_leaves_the_logits_alone() -> None:
    before, layout = canonical_copy(model_of("llama"), fold=True, tie="untie")
    bases = elements(layout, layout.points, 3)
    cut = {p: Change.rotation(A).columns(torch.arange(WIDTH)) for p, A in bases.items()}
    chain = Chain(dict.fromkeys(layout.points[1:], WIDTH))
    followed = {
        p: replace(chain.add(p, c, torch.eye(32).double()), entry=None) for p, c in cut.items()
    }
    halfway = {p: replace(c, decode=cut[p].decode) for p, c in followed.items()}
    results = []
    for changes in (cut, followed, halfway):
        model = copy_in(torch.float64, before)
        reparametrize(model, layout, changes)
        assert len(label(model).shortcuts) == layout.depth and not label(model).ranks
        results.append(found(model))
    assert relative_error(results[0], results[1]) <= exact(layout)
    assert relative_error(results[0], results[2]) > MOVED * exact(layout)


# --- In a run.


@pytest.mark.parametrize("order", ["oneshot", "sequential"])
@pytest.mark.parametrize("family", ["llama", "opt", "phi"])
def test_full_rank_is_exact_and_error_falls_with_rank(family: str, order: str) -> None:
    whole = sliced(recipe(RANDOM, order=order), family)
    goal = found(whole.model)
    errors = []
    for rank in (0, 4, ENOUGH - 1, ENOUGH, "exact"):
        low = sliced(recipe(of_rank(rank, RANDOM), order=order), family)
        errors.append(relative_error(goal, found(low.model)))
    assert max(errors[-2:]) <= exact(whole.layout)
    assert errors[-3] > MOVED * exact(whole.layout)
    assert errors[:4] == sorted(errors[:4], reverse=True)


@pytest.mark.parametrize("order", ["sequential", "dense_target"])
def test_a_walk_sees_what_shortcuts_leave_out(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream that a walk carries to the end is that of the model that it leaves."""
    walked: list[Batch] = []
    real = walk.sequential

    def watched(parts: Any, batches: list[Batch], *args: Any, **options: Any) -> None:
        walked.extend(batches)
        real(parts, batches, *args, **options)

    monkeypatch.setattr(walk, "sequential", watched)
    low = sliced(recipe(of_rank(6), MLP, order=order))
    seen = torch.cat([batch.x for batch in walked]).double()
    bound = tolerance(torch.float32, low.layout.depth)
    assert relative_error(seen, behind(low.model)) <= bound
    for edge in low.layout.edges:
        stage = low.model.get_submodule(edge.stage)
        assert isinstance(stage, Stage) and stage.low_rank
        stage.shortcut = None
    assert relative_error(seen, behind(low.model)) > 10 * bound


def behind(model: PreTrainedModel) -> Tensor:
    """What arrives before the final norm."""
    streams: list[Tensor] = []
    norm = model.get_submodule(architecture(model.config).final_norm)
    handle = norm.register_forward_pre_hook(lambda _m, a: streams.append(a[0].detach()))
    logits(model, tokens().ids)
    handle.remove()
    return streams[0]


@pytest.mark.parametrize("order", ["oneshot", "sequential", "dense_target"])
@pytest.mark.parametrize(("segments", "count"), [("block", 1), ("stage", 4)])
def test_counts_are_those_of_the_file_and_a_folder_loads_again(
    segments: str, count: int, order: str, tmp_path: Path
) -> None:
    asked = recipe(of_rank(5, STAGES | {"segments": segments}), MLP, order=order)
    result = made(asked)
    parts = result.report["parameters"]["sliced"]
    assert parts["shortcuts"] == count * 5 * WIDTH
    assert parts["total"] == sum(p.numel() for p in result.model.parameters())
    result.model.save_pretrained(tmp_path)
    assert stored_numbers(tmp_path) == parts["total"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(found(again), found(result.model))
    layout = layout_of_config(again.config)
    assert len(layout.ranks) == count and set(layout.ranks.values()) == {5}
    assert layout.parameters({}).to_dict() == parts
    flops = result.report["flops_per_token"]["sliced"]
    assert layout.flops({}) == flops
    whole = plan(recipe(STAGES | {"segments": segments}, MLP), dense().config)
    assert whole.flops(result.report["widths"]) - flops == 2 * count * (WIDTH**2 - 2 * 5 * WIDTH)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["invariance"].pop("ranks")
    (tmp_path / "config.json").write_text(
        json.dumps(config)
    )  # the shortcuts' shapes then fit no more
    with pytest.raises((RuntimeError, ValueError)):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_with_rank_0_the_stream_passes_by_and_a_stock_checkpoint_comes_out() -> None:
    result = made(recipe(of_rank(0)))
    assert (
        result.report["model"]["stock"] and result.report["parameters"]["sliced"]["shortcuts"] == 0
    )
    assert (
        plan(recipe(of_rank(0)), dense().config).why_not_stock({p: WIDTH for p in points()}) is None
    )
    assert not made(recipe(of_rank(1))).report["model"]["stock"]
    one = made(recipe(STAGES | {"segments": "global"}))  # the same shapes, another model
    assert relative_error(found(one.model), found(result.model)) > 10 * tolerance(torch.float32, 4)


def points() -> list[str]:
    return plan(recipe(STAGES), dense().config).layout.points


@pytest.mark.parametrize("resource", ["parameters", "flops"])
def test_a_budget_is_met_and_spent_with_shortcuts_charged_as_stored(resource: str) -> None:
    asked = recipe(of_rank(4, STAGES | {"select": "uniform"}), budget={resource: 0.9})
    chart = plan(asked, dense().config)
    widths = chart.allocate(None)
    assert widths is not None and len(set(widths.values())) == 1
    limit = (
        0.9
        * {"parameters": chart.dense.parameters({}).total, "flops": chart.dense.flops({})}[resource]
    )
    assert (
        chart.amount(resource, widths)
        <= limit
        < chart.amount(resource, {n: k + 1 for n, k in widths.items()})
    )
    stored = made(asked).report
    assert stored["parameters"]["sliced"]["total"] == chart.parameters(widths).total
    whole = plan(recipe(STAGES), dense().config)
    assert whole.amount(resource, widths) > limit  # what the rank saves was spent on width


def test_a_model_with_shortcuts_of_low_rank_can_change_basis_again() -> None:
    low = sliced(recipe(of_rank(5)))
    before, now = found(low.model), label(low.model)
    bases = rotations(elements(now, now.points, 7))
    twin = copy_in(torch.float64, low.model)
    reparametrize(twin, now, {"x.1.0": bases["x.1.0"]})
    assert set(label(twin).ranks) == {
        p for p in now.ranks if p not in ("x.1.0", "x.1.1")
    }  # its two edges
    reparametrize(twin, label(twin), {p: c for p, c in bases.items() if p != "x.1.0"})
    assert not label(twin).ranks and len(label(twin).shortcuts) == now.depth
    assert relative_error(before, found(twin)) <= exact(now)
    stage = low.model.get_submodule(now.edges[0].stage)
    assert isinstance(stage, Stage)
    stage.low_rank = False  # F as if it were the whole
    stage.shortcut = torch.nn.Parameter(stage.shortcut @ stage.shortcut.mT)
    assert relative_error(before, found(low.model)) > MOVED * exact(now)


def test_a_held_out_loss_is_that_of_the_model_that_comes_out() -> None:
    asked = recipe(of_rank(4), MLP)
    chart = plan(asked, dense().config)
    run = pipeline._Run(live(dense()), chart, tokens(), Means())
    run.calibration.measure(chart.of_dense())
    run._fit(chart.units)
    widths = chart.allocate(None)
    assert widths is not None
    measured = run.choosing.held_out(tokens())(widths)
    losses = [
        math.log(perplexity(copy_in(torch.float32, sliced(asked).model), tokens(), 8, quiet, ""))
        for asked in (recipe(of_rank(4), MLP), recipe(STAGES, MLP))
    ]
    bound = tolerance(torch.float32, chart.layout.depth)
    assert abs(measured - losses[0]) <= bound < abs(measured - losses[1])


# --- What a plan says.


def test_a_low_rank_joins_bases_of_one_step_and_one_width() -> None:
    last = points()[-1]
    headless = plan(recipe(of_rank(3) | {"slice_head": False}), dense().config)
    assert set(headless.ranks) == set(points()[1:-1]) and last not in headless.ranks
    widths = headless.allocate(None)
    assert widths is not None
    assert (
        headless.parameters(widths).shortcuts == 3 * 3 * WIDTH + WIDTH * 32
    )  # the last is a whole one
    apart = plan(
        recipe(of_rank(3) | {"spaces": "x.0.*"}, of_rank(3) | {"spaces": "x.[12].*"}),
        dense().config,
    )
    assert set(apart.ranks) == {"x.0.1", "x.1.1", last}
    assert plan(recipe(STAGES), dense().config).ranks == {}
    assert Statistic.NORMED in headless.units[0].needs
    assert Statistic.NORMED not in plan(recipe(STAGES), dense().config).units[0].needs


REFUSED = [
    (of_rank(4) | {"segments": "global"}, "one basis for the whole stream there are none"),
    (
        of_rank(4) | {"spaces": "mlp", "segments": "global", "rotate": "permute"},
        "about the residual stream alone",
    ),
    (
        {"spaces": "residual", "segments": "stage", "rotate": "pca", "shortcuts": {"rank": 4}},
        "nothing is cut",
    ),
    (of_rank(4) | {"slice": "least_squares"}, "needs the angles between what two bases keep"),
    (STAGES | {"shortcuts": {"rank": -1}}, "a number from 0, or exact"),
    (STAGES | {"shortcuts": {}}, "rank"),
    (STAGES | {"shortcuts": {"rnk": 3}}, "did you mean 'rank'"),
    (STAGES | {"shortcuts": {"rank": "whole"}}, "exact"),
    (of_rank(4) | {"widths": {"protect": {"first": 1}}}, "`protect` keeps"),
]


@pytest.mark.parametrize(("step", "told"), REFUSED, ids=[told[:30] for _, told in REFUSED])
def test_what_makes_no_sense_is_refused(step: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        plan(recipe(step), dense().config)
    plan(recipe(of_rank(4)), dense().config)


@pytest.mark.parametrize("rank", ["exact", 31])
def test_no_rank_stores_more_than_makes_shortcuts_exact(rank: int | str) -> None:
    for width, columns in ((WIDTH, ENOUGH), (10, 10), (32, 0)):
        step = of_rank(rank, STAGES | {"select": {"uniform": {"width": width}}})
        result = made(recipe(step))
        stored = result.report["parameters"]["sliced"]["shortcuts"]
        assert (
            stored
            == 4 * columns * width
            == sum(n for p, n in sizes(result) if p.endswith("shortcut"))
        )
        assert result.report["model"]["stock"] == (not columns)


def sizes(result: Outcome) -> list[tuple[str, int]]:
    return [(name, p.numel()) for name, p in result.model.named_parameters()]


def test_turned_bases_are_not_nested() -> None:
    step, keys = STAGES | {"select": "uniform"}, {"budget": {"parameters": 0.9}, "nested": [0.8]}
    with pytest.raises(InputError, match="shortcuts: they turn what one width keeps"):
        recipe(of_rank(3, step), **keys)
    recipe(step, **keys)


def test_no_data_no_rank() -> None:
    step = RANDOM | {"shortcuts": {"rank": 2}}
    with pytest.raises(InputError, match="has no `calibrate`"):
        plan(Recipe.from_dict({"model": "m", "steps": [step]}), dense().config)
    plan(Recipe.from_dict({"model": "m", "steps": [RANDOM]}), dense().config)
