"""Selectors under one budget: against brute force, on a loss that is known, and measured end to end on a tiny model."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from folders import VOCABULARY, model_of, save_tokens
from hypothesis import given
from hypothesis import strategies as st
from invariance.methods import _spend
from torch import Tensor
from transformers import PreTrainedModel

from invariance import heldout, walk
from invariance.budget import Bill, Predicted, spendable
from invariance.canonical import canonicalize
from invariance.data import Tokens, load_tokens
from invariance.demand import Demand
from invariance.errors import InputError
from invariance.interfaces import Rotator, Selector, Statistic, find
from invariance.moments import Moments
from invariance.pipeline import Sliced, slice_model
from invariance.plan import plan
from invariance.recipe import Constraints, Recipe
from invariance.run import outcome
from invariance.space import Basis, Group, Space

SPACES = [
    Space("mlp.0", "mlp", 12, Group.MONOMIAL),
    Space("mlp.1", "mlp", 9, Group.MONOMIAL),
    Space("vo.0", "vo", 6, Group.INVERTIBLE, 2),
]
PRICE = {"mlp": 3, "vo": 8}
MEASURING: list[Any] = [
    find("select", "sensitivity")(),
    find("select", "sensitivity")(points=1),
    find("select", "greedy")(loss="measured"),
    find("select", "greedy")(loss="measured", step=0.3),
    find("select", "dynamic_programming")(curves="measured"),
    find("select", "cma_es")(evaluations=40, seed=0),
]
seeds = st.integers(0, 9999)


def additive(widths: Mapping[Space, int]) -> int:
    return 50 + sum(PRICE[s.kind] * widths.get(s, s.dim) for s in SPACES)


def bilinear(widths: Mapping[Space, int]) -> int:
    """As where the stream is cut too: the last space's width multiplies the others'."""
    first, second, third = (widths.get(s, s.dim) for s in SPACES)
    return 50 + third * (3 * first + 2 * second)


def pooled(widths: Mapping[Space, int]) -> int:
    """A second resource, that the last space alone spends."""
    return 2 * widths.get(SPACES[2], SPACES[2].dim)


def bill(share: float, cost: Any = additive, **options: Any) -> Bill:
    allowed = {s: tuple(range(1, s.dim + 1)) for s in SPACES}
    return Bill({"parameters": cost}, {"parameters": int(share * cost({}))}, allowed, **options)


def spectra(seed: int) -> dict[Space, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        s: torch.rand(s.copies, s.dim, generator=g, dtype=torch.float64).pow(3).sort(-1, True)[0]
        for s in SPACES
    }


def quadratic(widths: Mapping[Space, int]) -> float:
    """A held-out loss of which no space knows alone: cuts of the first two hurt each other."""
    gone = [1 - widths.get(s, s.dim) / s.dim for s in SPACES]
    return 2.0 + gone[0] ** 2 + 4 * gone[1] ** 2 + gone[2] + 3 * gone[0] * gone[1]


def choices(cost: Bill) -> Iterator[dict[Space, int]]:
    """Every choice of widths that fits."""
    for ks in itertools.product(*cost.widths.values()):
        widths = dict(zip(cost.widths, ks, strict=True))
        assert cost.limit is not None
        if cost(widths) <= cost.limit:
            yield widths


def spend(selector: Selector, seed: int, cost: Bill) -> Mapping[Space, int]:
    return selector.allocate(spectra(seed), cost, cost.limit)


# --- Against brute force.


def total(curves: _spend.Curves, widths: Mapping[Space, int]) -> float:
    return sum(curves[s][k] for s, k in widths.items())


@given(seed=seeds, share=st.floats(0.5, 1), of=st.sampled_from(["share", "absolute"]))
def test_dynamic_programming_finds_the_least_loss_of_all_choices(seed: int, share: float, of: Any) -> None:
    cost = bill(share)
    curves = _spend.spectral(spectra(seed), cost, of)
    widths = spend(find("select", "dynamic_programming")(of=of), seed, cost)
    best = min(total(curves, w) for w in choices(cost))
    assert total(curves, widths) <= best + 1e-12


def test_water_filling_does_not_always_find_it() -> None:
    """The control: one step at a time is not optimal, so that brute force can tell them apart."""
    worse = 0
    for seed in range(20):
        cost = bill(0.7)
        curves = _spend.spectral(spectra(seed), cost, "share")
        best = min(total(curves, w) for w in choices(cost))
        worse += total(curves, spend(find("select", "global_energy")(), seed, cost)) > best + 1e-9
    assert worse


@given(seed=seeds, share=st.floats(0.5, 1))
def test_measured_curves_at_every_width_are_spent_optimally(seed: int, share: float) -> None:
    """Curves that rise by chance and are not convex; the prediction is their sum."""
    g = np.random.default_rng(seed)
    rise = {s: np.append(np.cumsum(g.exponential(size=s.dim - 1) ** 2)[::-1], 0.0) for s in SPACES}
    cost = bill(share, loss=lambda w: 1.5 + sum(rise[s][k - 1] for s, k in w.items()))
    widths = spend(find("select", "dynamic_programming")(curves="measured", points=200), seed, cost)
    best = min(sum(rise[s][k - 1] for s, k in w.items()) for w in choices(cost))
    assert isinstance(widths, Predicted)
    assert widths.loss == pytest.approx(sum(rise[s][k - 1] for s, k in widths.items()))
    assert widths.loss <= best + 1e-9


@given(seed=seeds, share=st.floats(0.4, 1))
def test_where_costs_multiply_the_budget_is_met_and_nothing_fits_beside(seed: int, share: float) -> None:
    cost = bill(share, bilinear)
    curves = _spend.spectral(spectra(seed), cost, "share")
    widths = spend(find("select", "dynamic_programming")(), seed, cost)
    assert cost.limit is not None and cost(widths) <= cost.limit
    for s, k in widths.items():
        if k < s.dim and curves[s][k + 1] < curves[s][k]:
            assert cost({**widths, s: k + 1}) > cost.limit


@pytest.mark.parametrize("name", ["global_energy", "dynamic_programming", "greedy", "influence", "uniform"])
@given(seed=seeds, first=st.floats(0.5, 1), second=st.floats(0.2, 1))
def test_several_resources_are_all_kept_within(name: str, seed: int, first: float, second: float) -> None:
    amounts = {"parameters": additive, "kv_cache": pooled}
    limits = {"parameters": first * additive({}), "kv_cache": second * pooled({})}
    cost = Bill(amounts, limits, bill(1).widths, influence=dict.fromkeys(SPACES, 0.2))
    widths = spend(find("select", name)(), seed, cost)
    assert all(amounts[r](widths) <= limits[r] for r in limits)


@pytest.mark.parametrize(
    ("name", "most"), [("global_energy", 1.5), ("greedy", 1.5), ("dynamic_programming", 1.1)]
)
@pytest.mark.parametrize("shares", [(0.8, 0.75), (0.6, 0.9), (0.9, 0.5), (0.7, 0.7)])
def test_several_resources_are_spent_nearly_as_well_as_can_be(
    name: str, most: float, shares: tuple[float, float]
) -> None:
    """Against the best of all choices. Pricing what the largest share saves, as a bill counts, fails this."""
    amounts = {"parameters": additive, "kv_cache": pooled}
    limits = {r: share * amounts[r]({}) for r, share in zip(amounts, shares, strict=True)}
    cost = Bill(amounts, limits, bill(1).widths)
    for seed in range(3):
        curves = _spend.spectral(spectra(seed), cost, "absolute")
        widths = spend(find("select", name)(of="absolute"), seed, cost)
        assert total(curves, widths) <= most * min(total(curves, w) for w in choices(cost))


# --- On a loss that is known.


@pytest.mark.parametrize("selector", MEASURING, ids=str)
@given(seed=st.integers(0, 30), share=st.floats(0.5, 1))
def test_a_measuring_selector_meets_its_budget_and_predicts(
    selector: Selector, seed: int, share: float
) -> None:
    asked: list[Any] = []
    cost = bill(share, loss=lambda w: asked.append(w) or quadratic(w))
    widths = spend(selector, seed, cost)
    assert cost.limit is not None and cost(widths) <= cost.limit
    assert set(widths) == set(SPACES) and all(k in cost.widths[s] for s, k in widths.items())
    assert widths == spend(selector, seed, cost)
    assert isinstance(widths, Predicted) and asked
    if selector.name in ("greedy", "cma_es"):  # which measure what they choose
        assert widths.loss == pytest.approx(quadratic(widths) - quadratic({}))
    whole = spend(selector, seed, replace(cost, limits={"parameters": additive({})}))
    assert all(k == s.dim for s, k in whole.items())
    assert isinstance(whole, Predicted) and whole.loss == 0


@pytest.mark.parametrize("selector", MEASURING, ids=str)
def test_a_measuring_selector_goes_by_the_loss_and_not_by_its_sign(selector: Selector) -> None:
    """A loss that punishes cuts of one space only: it stays wide. The control: the other way round, it does not."""

    def kept(space: Space) -> int:
        dear = {s: 10.0 if s == space else 0.1 for s in SPACES[:2]} | {SPACES[2]: 10.0}
        cost = bill(0.75, loss=lambda w: sum(dear[s] * (1 - k / s.dim) for s, k in w.items()))
        flat = {s: torch.ones(s.copies, s.dim, dtype=torch.float64) for s in SPACES}
        return selector.allocate(flat, cost, cost.limit)[SPACES[0]]

    assert kept(SPACES[0]) > kept(SPACES[1])


def test_an_infinite_loss_is_survived() -> None:
    for selector in MEASURING:
        cost = bill(0.8, loss=lambda w: math.inf if w.get(SPACES[0], 12) < 6 else quadratic(w))
        assert cost(spend(selector, 0, cost)) <= cost.limit  # type: ignore[operator]


def test_the_search_is_never_worse_than_where_it_began_and_finds_better() -> None:
    cost = bill(0.7, loss=quadratic)
    for seed in range(3):
        began = quadratic(spend(find("select", "global_energy")(), seed, cost))
        few = spend(find("select", "cma_es")(evaluations=1, seed=seed), seed, cost)
        many = spend(find("select", "cma_es")(evaluations=150, seed=seed), seed, cost)
        assert quadratic(few) <= began and quadratic(many) < began
        least = min(quadratic(w) for w in choices(cost))
        assert quadratic(many) <= (began + least) / 2


def test_a_search_asks_for_no_more_than_its_evaluations_and_leaves_numpys_seed() -> None:
    asked: set[tuple[int, ...]] = set()

    def loss(widths: Mapping[Space, int]) -> float:
        if widths:
            asked.add(tuple(widths.values()))
        return quadratic(widths)

    np.random.seed(7)
    before = np.random.get_state()[1].tolist()  # type: ignore[index,union-attr]
    spend(find("select", "cma_es")(evaluations=30, seed=1), 0, bill(0.7, loss=loss))
    assert 8 <= len(asked) <= 30
    assert np.random.get_state()[1].tolist() == before  # type: ignore[index,union-attr]


@given(epsilon=st.sampled_from([0.02, 0.1, 1.0]), share=st.floats(0.6, 0.98))
def test_influence_shares_sparsity_by_the_closed_form(epsilon: float, share: float) -> None:
    """At equal prices and fine widths, the sparsities are to each other as softmax(-BI/ε); none beyond what is there."""
    spaces = [Space(f"mlp.{i}", "mlp", 4000, Group.MONOMIAL) for i in range(3)]
    influence = dict(zip(spaces, (0.10, 0.12, 0.15), strict=True))

    def stored(widths: Mapping[Space, int]) -> int:
        return sum(widths.get(s, s.dim) for s in spaces)

    limit = int(share * 12000)
    allowed = {s: tuple(range(1, 4001)) for s in spaces}
    cost = Bill({"parameters": stored}, {"parameters": limit}, allowed, influence=influence)
    widths = find("select", "influence")(epsilon=epsilon).allocate(
        {s: None for s in spaces}, cost, cost.limit
    )
    assert limit - 3 <= stored(widths) <= limit
    score = np.exp(-np.array(list(influence.values())) / epsilon)
    phi = (1 - share) * 3 * score / score.sum()
    if phi.max() < 0.99:
        found = np.array([1 - widths[s] / s.dim for s in spaces])
        assert np.abs(found - phi).max() < 2e-3
        assert found[0] > found[2]


def test_with_one_influence_for_all_the_cut_is_uniform() -> None:
    cost = bill(0.7, influence=dict.fromkeys(SPACES, 0.3))
    widths = spend(find("select", "influence")(), 0, cost)
    assert widths == spend(find("select", "uniform")(), 0, cost)
    uneven = bill(0.7, influence=dict(zip(SPACES, (0.9, 0.1, 0.3), strict=True)))
    assert widths != spend(find("select", "influence")(), 0, uneven)  # the control


def test_of_decides_whether_energies_are_compared_as_they_are() -> None:
    small = spectra(0)
    small[SPACES[0]] = small[SPACES[0]] * 1e-6
    cost = bill(0.8)
    for name in ("global_energy", "greedy", "dynamic_programming"):
        absolute = find("select", name)(of="absolute").allocate(small, cost, cost.limit)
        share = find("select", name)().allocate(small, cost, cost.limit)
        assert absolute[SPACES[0]] < share[SPACES[0]]
        same = find("select", name)().allocate(spectra(0), cost, cost.limit)
        assert same == share  # shares do not see the scale


# --- Influence, measured.


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_the_influence_of_a_block_is_that_of_its_streams(family: str) -> None:
    model = model_of(family).double()
    ids = torch.randint(1, VOCABULARY, (6, 10), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        streams: list[Tensor] = []
        for block in model.get_submodule("model.layers").children():
            block.register_forward_hook(
                lambda _m, a, y: streams.extend((a[0], y if torch.is_tensor(y) else y[0]))
            )
        model(input_ids=ids)
    expected = [
        torch.nn.functional.cosine_similarity(a, b, dim=-1).mean().item()
        for a, b in zip(streams[::2], streams[1::2], strict=True)
    ]
    model = model_of(family).double()
    layout = canonicalize(model, fold=False)
    wanted = {f"x.{i}.0": frozenset({Statistic.COSINE}) for i in range(2)}

    def found(batches: list[Tensor]) -> Moments:
        entered = walk.enter(
            model, layout, [(b, torch.ones_like(b, dtype=torch.bool)) for b in batches], torch.float64
        )
        return walk.oneshot(model, layout, entered, wanted, torch.float64)

    whole, parts = found([ids]), [found([part]) for part in ids.split(2)]
    merged = parts[0].merge(parts[1]).merge(parts[2])
    for i, cosine in enumerate(expected):
        key = (f"x.{i}.0", Statistic.COSINE)
        assert whole.known[key].mean.item() == pytest.approx(cosine, abs=1e-5) and cosine < 0.999
        assert merged.known[key].mean.item() == pytest.approx(cosine, abs=1e-5)
        assert merged.known[key].count == ids.numel()


# --- End to end.

MLP = {"spaces": "mlp", "rotate": "permute", "slice": "least_squares"}
HEADS = {"spaces": "vo", "rotate": "head_svd"}
STREAM = {"spaces": "residual", "rotate": "pca"}
NAMED: list[Any] = [
    "influence",
    {"global_energy": {"of": "absolute"}},
    "dynamic_programming",
    {"dynamic_programming": {"curves": "measured", "points": 2}},
    {"sensitivity": {"points": 2}},
    "greedy",
    {"greedy": {"loss": "measured", "step": 0.25}},
    {"cma_es": {"evaluations": 12}},
]


@pytest.fixture(scope="module", autouse=True)
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    root = tmp_path_factory.mktemp("selectors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INVARIANCE_CACHE", str(root / "cache"))
        patch.chdir(root)
        save_tokens(root / "tokens.npy", sequences=32)
        yield


def recipe(select: Any, *steps: dict[str, Any], **keys: Any) -> Recipe:
    text = {
        "model": "m",
        "calibrate": {"data": "tokens.npy", "dtype": "float32", "batch": 8},
        "budget": {"parameters": 0.85},
        "steps": [step | {"select": select} for step in steps or (MLP, HEADS)],
    }
    return Recipe.from_dict(text | keys)


def tokens() -> Tokens:
    return load_tokens("tokens.npy", None, vocab_size=VOCABULARY)


def sliced(asked: Recipe, store: Path | None = None, model: PreTrainedModel | None = None) -> Sliced:
    model = model or model_of("llama")
    return slice_model(model, plan(asked, model.config), tokens(), store=store)


@pytest.mark.parametrize("order", ["oneshot", "sequential", "dense_target"])
@pytest.mark.parametrize("select", NAMED, ids=str)
def test_every_selector_runs_from_a_recipe_to_a_report(select: Any, order: str) -> None:
    evaluate = [{"perplexity": {"data": "tokens.npy"}}]
    found = outcome(model_of("llama"), recipe(select, order=order, evaluate=evaluate)).report
    assert found["parameters"]["sliced"]["total"] <= 0.85 * found["parameters"]["dense"]["total"]
    assert any(k < found["dims"][s] for s, k in found["widths"].items())
    ratio = found["perplexity"]["tokens.npy"]["sliced"] / found["perplexity"]["tokens.npy"]["dense"]
    assert found["predicted"]["measured"] == pytest.approx(math.log(ratio))
    measures = (
        find("select", "sensitivity").name in str(select) or "measured" in str(select) or "cma" in str(select)
    )
    assert (found["search"] is not None) == measures == (found["predicted"]["loss"] is not None)
    if measures:
        assert found["search"]["evaluations"] >= 2 and found["search"]["seconds"] >= 0
    json.dumps(found)


@pytest.mark.parametrize("order", ["oneshot", "sequential"])
@pytest.mark.parametrize(
    "select", ["influence", "dynamic_programming", {"sensitivity": {"points": 2}}, "greedy"]
)
def test_the_stream_may_be_cut_with_the_rest(select: Any, order: str) -> None:
    asked = recipe(select, STREAM, MLP, HEADS, budget={"parameters": 0.7}, order=order)
    sizes = outcome(model_of("llama"), asked).report["parameters"]
    assert sizes["sliced"]["total"] <= 0.7 * sizes["dense"]["total"]


def test_what_is_measured_is_the_loss_of_the_model_that_comes_out() -> None:
    """The float32 copy that is measured, and what a oneshot run makes of the same widths."""
    asked = recipe({"greedy": {"loss": "measured", "step": 0.5}})
    found = sliced(asked)
    _, held = heldout.split(tokens(), "")
    from invariance.losses import perplexity

    dense, after = (math.log(perplexity(m.float(), held)) for m in (model_of("llama"), found.model))
    assert found.predicted == pytest.approx(after - dense, abs=1e-4) and abs(after - dense) > 1e-3


def test_held_out_sequences_take_no_part_in_the_calibration() -> None:
    train, held = heldout.split(tokens(), "")
    assert len(held.ids) == 4 and torch.equal(torch.cat([train.ids, held.ids]), tokens().ids)
    model = model_of("llama")
    asked = recipe({"sensitivity": {"points": 1}})
    other = tokens()
    other.ids[-4:] = other.ids[-4:].flip(0, 1)
    one, two = (slice_model(model, plan(asked, model.config), t).spectra["mlp.0"] for t in (tokens(), other))
    assert torch.equal(one, two)
    other.ids[0] = other.ids[0].flip(0) % 7 + 1  # the control
    assert not torch.equal(one, slice_model(model, plan(asked, model.config), other).spectra["mlp.0"])


def test_an_interrupted_search_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = recipe({"cma_es": {"evaluations": 17}})
    through = sliced(asked, tmp_path / "other")
    measure, calls = heldout.HeldOut._measure, [0]

    def failing(self: Any, cut: Any) -> float:
        calls[0] += 1
        if calls[0] == 6:
            raise KeyboardInterrupt
        return measure(self, cut)

    monkeypatch.setattr(heldout.HeldOut, "_measure", failing)
    with pytest.raises(KeyboardInterrupt):
        sliced(asked, tmp_path)
    again = sliced(asked, tmp_path)
    assert through.search and again.search and again.widths == through.widths
    assert again.predicted == pytest.approx(through.predicted)
    assert again.search["evaluations"] == through.search["evaluations"]
    assert again.search["measured"] == through.search["measured"] - 5
    third = sliced(asked, tmp_path)
    assert third.search and third.search["measured"] == 0 and third.widths == through.widths
    other = sliced(recipe({"cma_es": {"evaluations": 17}}, MLP | {"rotate": "identity"}, HEADS), tmp_path)
    assert other.search and other.search["measured"] > 0  # the control: another search


@pytest.mark.parametrize("content", ["", "[]", '{"": "x"}', '{"mlp.0=1": 1'])
def test_a_damaged_memory_of_losses_counts_as_missing(tmp_path: Path, content: str) -> None:
    asked = recipe({"sensitivity": {"points": 1}})
    first = sliced(asked, tmp_path)
    (file,) = tmp_path.rglob("losses.*.json")
    file.write_text(content)
    again = sliced(asked, tmp_path)
    assert again.search and first.search and again.search["measured"] == first.search["measured"] > 0
    assert again.widths == first.widths


# --- What the energies predict.


@dataclass(frozen=True)
class InNats(Rotator):
    """Channels as they are, with energies that are losses by their own word."""

    name = "in_nats"
    produces = Group.PERMUTATION
    nats = True

    def fit(self, space: Space, moments: Moments) -> Basis:
        eye = torch.eye(space.dim, dtype=torch.float64).repeat(space.copies, 1, 1)
        return Basis(eye, torch.full((space.copies, space.dim), 0.01, dtype=torch.float64))


def test_energies_in_nats_predict_a_loss_and_others_none() -> None:
    asked = recipe({"uniform": {"width": 40}}, MLP, budget=None)
    assert sliced(asked).predicted is None
    chart = plan(asked, model_of("llama").config)
    truncate = find("slice", "truncate")()
    nats = replace(chart, units=tuple(replace(u, rotate=InNats(), slice=truncate) for u in chart.units))
    assert slice_model(model_of("llama"), nats, tokens()).predicted == pytest.approx(2 * 24 * 0.01)
    refit = replace(chart, units=tuple(replace(u, rotate=InNats()) for u in chart.units))
    assert slice_model(model_of("llama"), refit, tokens()).predicted is None  # energies that assume no refit


# --- Refusals.

BAD: list[tuple[Any, str]] = [
    ({"influence": {"epsilon": 0.0}}, "epsilon must be above 0"),
    ({"sensitivity": {"points": 0}}, "points must be at least 1"),
    ({"greedy": {"step": 0.0}}, "step must be above 0"),
    ({"greedy": {"loss": "measured", "of": "absolute"}}, "`of` is about spectra"),
    ({"dynamic_programming": {"curves": "measured", "of": "absolute"}}, "`of` is about spectra"),
    ({"dynamic_programming": {"points": 4}}, "`points` is about measured curves"),
    ({"cma_es": {"evaluations": 0}}, "evaluations must be at least 1"),
    ({"cma_es": {"sigma": 2.0}}, "sigma must be"),
]


@pytest.mark.parametrize(("select", "message"), BAD, ids=str)
def test_options_that_cannot_be_are_refused(select: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        recipe(select)


@pytest.mark.parametrize("select", ["influence", "sensitivity", "cma_es"])
def test_without_data_or_a_budget_a_measuring_selector_is_refused(select: str) -> None:
    step = {"spaces": "mlp", "select": select}
    with pytest.raises(InputError, match=r"reads moments|measures losses.*no data"):
        Recipe.from_dict({"model": "m", "budget": {"parameters": 0.8}, "steps": [step]})
    with pytest.raises(InputError, match="spends a budget"):
        Recipe.from_dict({"model": "m", "calibrate": {"data": "d"}, "steps": [step]})


@pytest.mark.parametrize("select", ["influence", "sensitivity", "greedy"])
def test_an_infeasible_budget_is_refused_before_anything_is_measured(select: str) -> None:
    asked = recipe(select, MLP, budget={"parameters": 0.1})
    with pytest.raises(InputError, match="cannot be met"):
        plan(asked, model_of("llama").config)


def test_too_few_sequences_to_hold_one_out_are_refused() -> None:
    asked, model = recipe("sensitivity"), model_of("llama")
    few = Tokens(tokens().ids[:7], tokens().mask[:7])
    with pytest.raises(InputError, match=r"7 sequences of 2 tokens or more.*holds out one in 8"):
        slice_model(model, plan(asked, model.config), few)


def test_a_missing_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"package `cma` is not installed.*invariance\[search\]"):
        recipe("cma_es")


@dataclass(frozen=True)
class Spendthrift(Selector):
    """A selector of a plugin that keeps all, whatever the budget."""

    name = "spendthrift"
    needs_budget = True

    def allocate(self, spectra: Any, cost: Bill, budget: float | None) -> dict[Space, int]:
        return cost.whole


def test_widths_above_the_budget_are_the_methods_fault_and_refused() -> None:
    recipe = Recipe.from_dict({
        "model": "m", "calibrate": {"data": "tokens.npy"}, "budget": {"parameters": 0.9},
        "steps": [{"spaces": "mlp", "rotate": "permute", "select": "uniform"}],
    })  # fmt: skip
    chart = plan(recipe, model_of("llama").config)
    spend = replace(chart, units=tuple(replace(u, select=Spendthrift()) for u in chart.units))
    with pytest.raises(InputError, match=r"'spendthrift' gave widths that spend .* fault of the method"):
        spend.allocate(None)
    assert chart.allocate(None) is not None  # the control: one that keeps to it


@given(seeds)
def test_the_budget_that_a_refusal_names_can_be_met(seed: int) -> None:
    least, dense = additive({s: 1 for s in SPACES}), additive({})
    limit = int(np.random.default_rng(seed).integers(1, least))
    refused = replace(bill(1.0), limits={"parameters": limit}, dense={"parameters": dense})
    with pytest.raises(InputError) as e:
        refused.check()
    share = float(str(e.value).split("`parameters: ")[1].split("`")[0])
    replace(refused, limits={"parameters": int(share * dense)}).check()
    with pytest.raises(InputError):
        replace(refused, limits={"parameters": int((share - 0.01) * dense)}).check()


def test_several_budgets_that_nothing_meets_are_refused_together() -> None:
    spent, limits = (
        {"flops": 80, "kv_cache": 9, "parameters": 5},
        {"flops": 70, "kv_cache": 6, "parameters": 5},
    )
    amounts = {r: lambda _, n=n: n for r, n in spent.items()}
    poor = Bill(amounts, limits, {}, dense=dict.fromkeys(spent, 100))
    with pytest.raises(
        InputError, match=r"70 FLOPs a token and 6 KV .* leave 80 and 9.* `flops: 0\.8, kv_cache: 0\.09`"
    ):
        poor.check()


def test_a_share_of_a_budget_is_what_is_written_and_not_its_nearest_float() -> None:
    assert int(0.7 * 11520) == 8063 and spendable(0.7, 11520) == 8064
    assert spendable(0.7, 11521) == 8064 and spendable(1.0, 7) == 7


def test_narrowest_heads_of_every_block_leave_one_attention() -> None:
    def heads(budget: float) -> Recipe:
        steps = [
            {"spaces": n, "rotate": "permute", "select": "global_energy", "widths": {"min": 0}}
            for n in ("heads", "mlp")
        ]
        return recipe("global_energy", *steps, budget={"parameters": budget})

    config = model_of("llama").config
    with pytest.raises(InputError) as e:
        plan(heads(0.01), config)
    share = float(str(e.value).split("`parameters: ")[1].split("`")[0])
    chart = plan(heads(share), config)
    flat = {u.space.name: torch.ones(u.space.copies, u.space.dim) for u in chart.units}
    widths = chart.allocate(flat)
    assert widths is not None and widths["heads.0"] == 1
    assert not any(k for n, k in widths.items() if n != "heads.0")
    assert chart.parameters(widths).total <= share * chart.parameters({}).total


def test_shares_of_a_width_are_limits_to_the_letter() -> None:
    step = {"spaces": "mlp", "rotate": "permute", "select": {"uniform": {"keep": 0.9}}}
    recipe = Recipe.from_dict({"model": "m", "calibrate": {"data": "tokens.npy"}, "steps": [step]})
    (unit, *_) = plan(recipe, model_of("llama").config).units
    for share, least in ((0.73, 47), (0.99, 64), (0.5, 32)):  # of 64
        assert Demand((unit,), Constraints(min=share)).allowed(2, ())[0] == least


# One threshold for scores, each space on its own scale


@given(seed=st.integers(0, 999), share=st.floats(0.3, 0.95), multiple=st.sampled_from([1, 2, 4]))
def test_standardized_keeps_what_stands_out_in_its_own_space(seed: int, share: float, multiple: int) -> None:
    """FLAP by hand: scores pooled, the lowest removed one by one until the budget is met, then widths rounded down."""
    g = np.random.default_rng(seed)
    spaces = [Space(f"mlp.{i}", "mlp", d, Group.PERMUTATION) for i, d in enumerate((16, 12, 20))]
    energy = {s: np.sort(g.gamma(0.5, size=s.dim) * 10.0**i)[::-1].copy() for i, s in enumerate(spaces)}
    price = {s: 3.0 + i for i, s in enumerate(spaces)}

    def spent(widths: Mapping[Space, int]) -> float:
        return sum(price[s] * widths.get(s, s.dim) for s in spaces)

    allowed = {s: tuple(range(multiple, s.dim + 1, multiple)) for s in spaces}
    cost = Bill({"parameters": spent}, {"parameters": int(share * spent({}))}, allowed)
    spectra = {s: torch.from_numpy(e)[None] for s, e in energy.items()}
    found = find("select", "standardized")().allocate(spectra, cost, cost.limit)
    scores = {s: (e - e.mean()) / e.std() for s, e in energy.items()}
    left = {s: s.dim for s in spaces}

    def rounded() -> dict[Space, int]:
        return {s: max(k // multiple * multiple, multiple) for s, k in left.items()}

    for _, lowest in sorted((z, s) for s in spaces for z in scores[s]):
        if spent(rounded()) <= cost.limit:
            break
        left[lowest] -= 1
    assert found == rounded()


def test_standardized_does_not_hear_how_large_a_spaces_energies_are() -> None:
    g = np.random.default_rng(1)
    spaces = [Space(f"mlp.{i}", "mlp", 16, Group.PERMUTATION) for i in range(2)]
    energy = [np.sort(g.gamma(0.5, size=16))[::-1].copy() for _ in spaces]
    allowed = {s: tuple(range(1, 17)) for s in spaces}
    cost = Bill(
        {"parameters": lambda w: float(sum(w.get(s, 16) for s in spaces))}, {"parameters": 20}, allowed
    )

    def chosen(name: str, scale: float, **options: Any) -> Mapping[Space, int]:
        scaled = zip(spaces, energy, (1.0, scale), strict=True)
        spectra = {s: torch.from_numpy(e * k)[None] for s, e, k in scaled}
        return find("select", name)(**options).allocate(spectra, cost, cost.limit)

    assert chosen("standardized", 1.0) == chosen("standardized", 1e6)
    absolute = {"of": "absolute"}  # the control
    assert chosen("global_energy", 1.0, **absolute) != chosen("global_energy", 1e6, **absolute)
