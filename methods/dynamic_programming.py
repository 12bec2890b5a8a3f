"""Selector `dynamic_programming`: the widths of least predicted loss under a budget."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from operator import mul
from typing import Literal

import numpy as np

from invariance.core.space import Space
from invariance.method.budget import Bill
from invariance.method.interfaces import Selector

from ._spend import Curves, Of, Spectra, fill, measured, predicted, spectral

BINS = 30_000  # into how many steps the savings are divided where whole numbers do not do
GRID = 128  # of how many widths a space the recursion chooses, evenly spread over those allowed


@dataclass(frozen=True)
class DynamicProgramming(Selector, name="dynamic_programming"):
    """Minimise the sum of the spaces' predicted losses under the budget.

    The loss of a space at width k is the energy beyond k (``curves: spectra``), or measured by cutting it alone
    (``curves: measured``, on held-out sequences at ``points`` widths, drawn between them by monotone interpolation). With
    s_i(k) what cutting space i alone to k saves, f_i(S) = min_k f_{i-1}(S - s_i(k)) + loss_i(k) is the least loss at which
    the first i spaces save S. Taken are the widths of the smallest S whose true cost meets the budget, then what is left
    is spent where it lowers the loss most.

    Guarantee: where one resource is limited, its cost is a sum over the spaces (so: MLPs beside one of `heads`, `vo` and
    `qk`, since what two of these cost in one block multiplies, and no residual stream), its savings share a unit that is
    1/30000 of all that can be saved or more, and no space has more than 128 allowed widths, the widths are optimal for the
    curves. Else savings are rounded down to such units, and 128 widths of each space are compared. Where costs multiply, the
    widths meet the budget, and are optimal at the prices that the whole model has. Where several resources are limited,
    savings are sums of shares of them, which are weighed by quarters in all ways, and the widths of least loss are taken.
    The predicted loss is in nats where curves are measured, or all rotators' energies are in nats.

    Source: the allocation problem of Shoham and Gersho 1988 (rate-distortion with arbitrary curves), solved by Bellman's
    recursion, as ZipLM, Kurtic et al. 2023, arXiv:2302.04089, section 3.2, does for structures of a network.
    """

    curves: Literal["spectra", "measured"] = "spectra"  # what predicts the loss of a width
    of: Of = "share"  # of spectra: share (of each space's energy) or absolute
    points: int = 3  # of measured curves: at how many widths each space is measured

    def __post_init__(self) -> None:
        if self.points < 1:
            raise ValueError("points must be at least 1")
        if self.curves == "measured" and self.of != "share":
            raise ValueError("`of` is about spectra: remove it, or `curves: measured`")
        if self.curves == "spectra" and self.points != 3:
            raise ValueError(
                "`points` is about measured curves: add `curves: measured`, or remove it"
            )

    needs_budget = True

    @property
    def compares(self) -> bool:
        return self.of == "absolute"

    @property
    def measures(self) -> bool:
        return self.curves == "measured"

    @property
    def needs_spectra(self) -> bool:
        return self.curves == "spectra"

    def allocate(self, spectra: Spectra, cost: Bill, budget: float | None) -> Mapping[Space, int]:
        assert budget is not None
        curves = measured(cost, self.points) if self.measures else spectral(spectra, cost, self.of)
        widths = _cheapest(curves, cost, budget)
        return predicted(widths, curves) if self.measures else widths


def _cheapest(curves: Curves, cost: Bill, budget: float) -> dict[Space, int]:
    """The widths of least loss; where several resources are limited, of all weights that the recursion is tried with."""
    allowed = {s: _grid(cost.widths[s][::-1]) for s in curves}  # the widest first: it wins ties
    each = [_saved(allowed, cost, r) for r in cost.amounts]
    found: list[tuple[float, int, dict[Space, int]]] = []
    for weights in _weights(len(each)):
        exact = {
            s: [sum(map(mul, weights, ks)) for ks in zip(*(e[s] for e in each), strict=True)]
            for s in allowed
        }
        widths = _recursion(curves, allowed, _units(exact), cost, budget)
        if cost(widths) <= budget:
            widths = fill(widths, curves, cost, budget)
            found.append((sum(curves[s][k] for s, k in widths.items()), len(found), widths))
    return min(found)[-1] if found else {s: ks[-1] for s, ks in allowed.items()}


def _weights(resources: int) -> list[tuple[float, ...]]:
    """What a share of each resource counts: quarters that add up to 1; one alone counts as it is."""
    if resources == 1:
        return [(1.0,)]
    return [tuple(n / 4 for n in ns) for ns in product(range(5), repeat=resources) if sum(ns) == 4]


def _recursion(
    curves: Curves,
    allowed: Mapping[Space, tuple[int, ...]],
    saved: Mapping[Space, list[int]],
    cost: Bill,
    budget: float,
) -> dict[Space, int]:
    """The widths of the smallest saving that meets the budget, by the recursion."""
    most = sum(max(column) for column in saved.values())
    least_loss = np.full(most + 1, np.inf)
    least_loss[0] = 0.0
    taken: dict[Space, np.ndarray] = {}
    for space, column in saved.items():
        found, index = np.full(most + 1, np.inf), np.zeros(most + 1, dtype=np.int32)
        for n, (k, s) in enumerate(zip(allowed[space], column, strict=True)):
            reached = (
                np.concatenate((np.full(s, least_loss[0]), least_loss[: most + 1 - s]))
                + curves[space][k]
            )
            better = reached < found
            found[better], index[better] = reached[better], n
        least_loss, taken[space] = found, index

    def at(S: int) -> dict[Space, int]:
        widths = {}
        for space in reversed(list(saved)):
            n = int(taken[space][S])
            widths[space] = allowed[space][n]
            S = max(S - saved[space][n], 0)
        return {space: widths[space] for space in saved}

    return at(bisect_left(range(most), True, key=lambda S: cost(at(S)) <= budget))


def _grid(widths: tuple[int, ...]) -> tuple[int, ...]:
    """All of the widths, or as many as the grid has, both ends among them."""
    if len(widths) <= GRID:
        return widths
    return tuple(widths[n * (len(widths) - 1) // (GRID - 1)] for n in range(GRID))


def _saved(
    allowed: Mapping[Space, tuple[int, ...]], cost: Bill, resource: str
) -> dict[Space, list[float]]:
    """What cutting each space alone to each of its widths saves of a resource; of one among several, as a share."""
    amount, unit = cost.amounts[resource], cost.limits[resource] if len(cost.amounts) > 1 else 1
    whole = amount(cost.whole)
    return {
        s: [(whole - amount({**cost.whole, s: k})) / unit for k in ks] for s, ks in allowed.items()
    }


def _units(exact: Mapping[Space, list[float]]) -> dict[Space, list[int]]:
    """Savings in the coarsest whole unit that is fine enough."""
    everything = sum(max(column) for column in exact.values())
    whole = [int(x) for column in exact.values() for x in column]
    unit: float = math.gcd(*whole) if all(x == int(x) for c in exact.values() for x in c) else 0
    if not unit or everything / unit > BINS:
        unit = everything / BINS or 1.0
    return {s: [max(int(x / unit + 1e-9), 0) for x in column] for s, column in exact.items()}
