"""Selector `dynamic_programming`: the widths of least predicted loss under a budget."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from invariance.budget import Bill
from invariance.interfaces import Selector
from invariance.space import Space

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

    Guarantee: where one resource is limited, its cost is a sum over the spaces (so: MLPs and heads, no residual stream),
    its savings share a unit that is 1/30000 of all that can be saved or more, and no space has more than 128 allowed
    widths, the widths are optimal for the curves. Else savings are rounded down to such units, and 128 widths of each
    space are compared. Where the stream is cut too, or several resources are limited, the widths meet the budget, and are
    optimal at the prices that the whole model has, resources counted by shares.

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
            raise ValueError("`points` is about measured curves: add `curves: measured`, or remove it")

    needs_budget = True

    @property
    def measures(self) -> bool:
        return self.curves == "measured"

    @property
    def needs_spectra(self) -> bool:
        return self.curves == "spectra"

    def allocate(self, spectra: Spectra, cost: Bill, budget: float | None) -> Mapping[Space, int]:
        assert budget is not None
        curves = measured(cost, self.points) if self.measures else spectral(spectra, cost, self.of)
        widths = fill(_cheapest(curves, cost, budget), curves, cost, budget)
        return predicted(widths, curves) if self.measures else widths


def _cheapest(curves: Curves, cost: Bill, budget: float) -> dict[Space, int]:
    """The widths of the smallest saving that meets the budget, by the recursion."""
    allowed = {s: _grid(cost.widths[s][::-1]) for s in curves}  # the widest first: it wins ties
    saved = _savings(allowed, cost)
    most = sum(max(column) for column in saved.values())
    least_loss = np.full(most + 1, np.inf)
    least_loss[0] = 0.0
    taken: dict[Space, np.ndarray] = {}
    for space, column in saved.items():
        found, index = np.full(most + 1, np.inf), np.zeros(most + 1, dtype=np.int32)
        for n, (k, s) in enumerate(zip(allowed[space], column, strict=True)):
            reached = (
                np.concatenate((np.full(s, least_loss[0]), least_loss[: most + 1 - s])) + curves[space][k]
            )
            better = reached < found
            found[better], index[better] = reached[better], n
        least_loss, taken[space] = found, index

    def at(S: int) -> dict[Space, int]:
        widths = {}
        for space in reversed(saved):
            n = int(taken[space][S])
            widths[space] = allowed[space][n]
            S = max(S - saved[space][n], 0)
        return {space: widths[space] for space in saved}

    widths = at(bisect_left(range(most), True, key=lambda S: cost(at(S)) <= budget))
    return widths if cost(widths) <= budget else {s: ks[-1] for s, ks in allowed.items()}


def _grid(widths: tuple[int, ...]) -> tuple[int, ...]:
    """All of the widths, or as many as the grid has, both ends among them."""
    if len(widths) <= GRID:
        return widths
    return tuple(widths[n * (len(widths) - 1) // (GRID - 1)] for n in range(GRID))


def _savings(allowed: Mapping[Space, tuple[int, ...]], cost: Bill) -> dict[Space, list[int]]:
    """What cutting each space alone to each of its widths saves, in the coarsest whole unit that is fine enough."""
    whole_cost = _spent(cost, {})
    exact = {s: [whole_cost - _spent(cost, {s: k}) for k in ks] for s, ks in allowed.items()}
    everything = sum(max(column) for column in exact.values())
    whole = [int(x) for column in exact.values() for x in column]
    unit: float = math.gcd(*whole) if all(x == int(x) for c in exact.values() for x in c) else 0
    if not unit or everything / unit > BINS:
        unit = everything / BINS or 1.0
    return {s: [max(int(x / unit + 1e-9), 0) for x in column] for s, column in exact.items()}


def _spent(cost: Bill, widths: Mapping[Space, int]) -> float:
    """What widths cost where the others are at their widest; of several resources, the sum of their shares."""
    at = {**cost.whole, **widths}
    if len(cost.amounts) == 1:
        return cost(at)
    return sum(amount(at) / cost.limits[r] for r, amount in cost.amounts.items())
