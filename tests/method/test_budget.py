"""Budgets and bills: several kept within at once, shares taken to the letter, and refusals whose advice can be met."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from bills import SPACES, additive, bill, choices, pooled, seeds, spectra, spend, total
from folders import model_of
from hypothesis import given
from hypothesis import strategies as st
from invariance.methods import _spend

from invariance.compress.demand import Demand
from invariance.compress.plan import Plan
from invariance.compress.planner import plan
from invariance.core.errors import InputError
from invariance.core.space import Space
from invariance.method.budget import Bill, spendable
from invariance.method.interfaces import Selector, find
from invariance.recipe.budget import Constraints
from invariance.recipe.recipe import Recipe


def bilinear(widths: Mapping[Space, int]) -> int:
    """As where the stream is cut too: the last space's width multiplies the others'."""
    first, second, third = (widths.get(s, s.dim) for s in SPACES)
    return 50 + third * (3 * first + 2 * second)


@given(seed=seeds, share=st.floats(0.4, 1))
def test_where_costs_multiply_the_budget_is_met_and_nothing_fits_beside(
    seed: int, share: float
) -> None:
    cost = bill(share, bilinear)
    curves = _spend.spectral(spectra(seed), cost, "share")
    widths = spend(find("select", "dynamic_programming")(), seed, cost)
    assert cost.limit is not None and cost(widths) <= cost.limit
    for s, k in widths.items():
        if k < s.dim and curves[s][k + 1] < curves[s][k]:
            assert cost({**widths, s: k + 1}) > cost.limit


@pytest.mark.parametrize(
    "name", ["global_energy", "dynamic_programming", "greedy", "influence", "uniform"]
)
@given(seed=seeds, first=st.floats(0.5, 1), second=st.floats(0.2, 1))
def test_several_resources_are_all_kept_within(
    name: str, seed: int, first: float, second: float
) -> None:
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


@dataclass(frozen=True)
class Spendthrift(Selector):
    """A selector of a plugin that keeps all, whatever the budget."""

    name = "spendthrift"
    needs_budget = True

    def allocate(self, spectra: Any, cost: Bill, budget: float | None) -> dict[Space, int]:
        return cost.whole


def test_widths_above_the_budget_are_the_methods_fault_and_refused() -> None:
    recipe = Recipe.from_dict(
        {
            "model": "m",
            "calibrate": {"data": "tokens.npy"},
            "budget": {"parameters": 0.9},
            "steps": [{"spaces": "mlp", "rotate": "permute", "select": "uniform"}],
        }
    )
    chart = plan(recipe, model_of("llama").config)
    spend = replace(chart, units=tuple(replace(u, select=Spendthrift()) for u in chart.units))
    with pytest.raises(
        InputError, match=r"'spendthrift' gave widths that spend .* fault of the method"
    ):
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
        InputError,
        match=r"70 FLOPs a token and 6 KV .* leave 80 and 9.* `flops: 0\.8, kv_cache: 0\.09`",
    ):
        poor.check()


def test_a_share_of_a_budget_is_what_is_written_and_not_its_nearest_float() -> None:
    assert int(0.7 * 11520) == 8063 and spendable(0.7, 11520) == 8064
    assert spendable(0.7, 11521) == 8064 and spendable(1.0, 7) == 7


def test_shares_of_a_width_are_limits_to_the_letter() -> None:
    step = {"spaces": "mlp", "rotate": "permute", "select": {"uniform": {"keep": 0.9}}}
    recipe = Recipe.from_dict({"model": "m", "calibrate": {"data": "tokens.npy"}, "steps": [step]})
    (unit, *_) = plan(recipe, model_of("llama").config).units
    for share, least in ((0.73, 47), (0.99, 64), (0.5, 32)):  # of 64
        assert Demand((unit,), (Constraints(min=share),)).allowed(2, ())[0] == least


def chart(**widths: Any) -> Plan:
    """A plan that gives all MLPs but the protected ones of a model of four blocks 32 of 64 channels."""
    step = {
        "spaces": "mlp",
        "rotate": "permute",
        "select": {"uniform": {"width": 32}},
        "widths": widths,
    }
    recipe = Recipe.from_dict({"model": "m", "calibrate": {"data": "tokens.npy"}, "steps": [step]})
    return plan(recipe, model_of("llama", num_hidden_layers=4).config)


@pytest.mark.parametrize(
    ("protect", "whole"),
    [
        ({"first": 1}, {0}),
        ({"last": 2}, {2, 3}),
        ({"first": 2, "last": 1}, {0, 1, 3}),
        ({"last": 4}, {0, 1, 2, 3}),
    ],
)
def test_protected_blocks_stay_whole_at_both_ends_and_the_others_get_their_width(
    protect: Any, whole: Any
) -> None:
    widths = chart(protect=protect).allocate(None)
    assert widths is not None
    assert {n: widths[f"mlp.{n}"] for n in range(4)} == {
        n: 64 if n in whole else 32 for n in range(4)
    }


def test_the_point_before_the_head_is_protected_with_the_last_block() -> None:
    step = {
        "spaces": "residual",
        "segments": "stage",
        "rotate": "pca",
        "select": {"uniform": {"width": 24}},
    }
    step |= {"widths": {"protect": {"last": 1}}}
    recipe = Recipe.from_dict({"model": "m", "calibrate": {"data": "tokens.npy"}, "steps": [step]})
    widths = plan(recipe, model_of("llama").config).allocate(None)
    assert widths is not None
    assert {p: widths[p] for p in ("x.0.1", "x.1.0", "x.1.1", "x.2.0")} == {
        "x.0.1": 24,
        "x.1.0": 32,
        "x.1.1": 32,
        "x.2.0": 32,
    }


def test_a_width_that_is_whole_is_a_multiple_as_well() -> None:
    (unit, *_) = chart().units
    assert Demand((unit,), (Constraints(multiple_of=24),)).allowed(4, ()) == (24, 48)  # of 64
    assert Demand((unit,), (Constraints(multiple_of=16),)).allowed(4, ()) == (16, 32, 48, 64)
