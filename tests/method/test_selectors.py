"""Selectors on bills of three spaces: against brute force, by their closed forms, and on a loss that is known."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from bills import SPACES, additive, bill, choices, seeds, spectra, spend, total
from hypothesis import given
from hypothesis import strategies as st
from invariance.methods import _spend

from invariance.core.group import Group
from invariance.core.space import Space
from invariance.method.budget import Bill, Predicted
from invariance.method.interfaces import Selector, find

MEASURING: list[Any] = [
    find("select", "sensitivity")(),
    find("select", "sensitivity")(points=1),
    find("select", "greedy")(loss="measured"),
    find("select", "greedy")(loss="measured", step=0.3),
    find("select", "dynamic_programming")(curves="measured"),
    find("select", "cma_es")(evaluations=40, seed=0),
]


def quadratic(widths: Mapping[Space, int]) -> float:
    """A held-out loss of which no space knows alone: cuts of the first two hurt each other."""
    gone = [1 - widths.get(s, s.dim) / s.dim for s in SPACES]
    return 2.0 + gone[0] ** 2 + 4 * gone[1] ** 2 + gone[2] + 3 * gone[0] * gone[1]


# --- Against brute force.


@given(seed=seeds, share=st.floats(0.5, 1), of=st.sampled_from(["share", "absolute"]))
def test_dynamic_programming_finds_the_least_loss_of_all_choices(
    seed: int, share: float, of: Any
) -> None:
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


@pytest.mark.parametrize("of", ["share", "absolute"])
def test_the_search_begins_at_the_widths_of_the_energies_that_it_is_told(of: str) -> None:
    cost = bill(0.7, loss=quadratic)
    for seed in range(3):
        start = spend(find("select", "global_energy")(of=of), seed, cost)
        assert spend(find("select", "cma_es")(evaluations=1, of=of, seed=seed), seed, cost) == start
        found = spend(find("select", "cma_es")(evaluations=60, of=of, seed=seed), seed, cost)
        assert quadratic(found) < quadratic(start)
    assert find("select", "cma_es")(of=of).compares == (of == "absolute")


def test_a_search_asks_for_no_more_than_its_evaluations_and_leaves_numpys_seed() -> None:
    asked: set[tuple[int, ...]] = set()

    def loss(widths: Mapping[Space, int]) -> float:
        if widths:
            asked.add(tuple(widths.values()))
        return quadratic(widths)

    np.random.seed(7)
    before = np.random.get_state()[1].tolist()  # type: ignore[index,union-attr]
    for most, least in ((30, 8), (5, 1), (1, 1)):  # a generation takes seven
        asked.clear()
        spend(find("select", "cma_es")(evaluations=most, seed=1), 0, bill(0.7, loss=loss))
        assert least <= len(asked) <= most
    assert np.random.get_state()[1].tolist() == before  # type: ignore[index,union-attr]


@given(share=st.floats(0.45, 1))
def test_one_fraction_for_all_is_the_largest_that_stays_within_the_budget(share: float) -> None:
    cost = bill(share)
    found = spend(find("select", "uniform")(), 0, cost)
    fractions = np.linspace(0, 1, 12 * 9 * 6 * 4 + 1)
    tried = [{s: max(int(f * s.dim + 1e-9), 1) for s in SPACES} for f in fractions]
    fitting = [widths for widths in tried if cost(widths) <= cost.limit]  # type: ignore[operator]
    assert found == fitting[-1]


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


# One threshold for scores, each space on its own scale


@given(seed=st.integers(0, 999), share=st.floats(0.3, 0.95), multiple=st.sampled_from([1, 2, 4]))
def test_standardized_keeps_what_stands_out_in_its_own_space(
    seed: int, share: float, multiple: int
) -> None:
    """FLAP by hand: scores pooled, the lowest removed one by one until the budget is met, then widths rounded down."""
    g = np.random.default_rng(seed)
    spaces = [Space(f"mlp.{i}", "mlp", d, Group.PERMUTATION) for i, d in enumerate((16, 12, 20))]
    energy = {
        s: np.sort(g.gamma(0.5, size=s.dim) * 10.0**i)[::-1].copy() for i, s in enumerate(spaces)
    }
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
        {"parameters": lambda w: float(sum(w.get(s, 16) for s in spaces))},
        {"parameters": 20},
        allowed,
    )

    def chosen(name: str, scale: float, **options: Any) -> Mapping[Space, int]:
        scaled = zip(spaces, energy, (1.0, scale), strict=True)
        spectra = {s: torch.from_numpy(e * k)[None] for s, e, k in scaled}
        return find("select", name)(**options).allocate(spectra, cost, cost.limit)

    assert chosen("standardized", 1.0) == chosen("standardized", 1e6)
    absolute = {"of": "absolute"}  # the control
    assert chosen("global_energy", 1.0, **absolute) != chosen("global_energy", 1e6, **absolute)
