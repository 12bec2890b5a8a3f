"""Selector `influence`: blocks that change the stream little give most."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from invariance.calibrate.statistic import Statistic
from invariance.core.space import Space
from invariance.method.budget import Bill
from invariance.method.interfaces import Selector

from ._spend import Spectra, scaled


@dataclass(frozen=True)
class Influence(Selector, name="influence"):
    """Sparsities by how little a block changes the stream: φ_i ∝ softmax(-BI_i / ε).

    BI_i = 1 - E[cos(x_i, y_i)], x_i the stream into block i and y_i out of it. All spaces of block i keep 1 - t φ_i of
    their directions, t the least that meets the budget. This maximises Σ BI_i (1 - φ_i) + ε H(φ), H the entropy, at a
    given sum of φ: the smaller ε, the more uneven. A basis that several blocks share takes the mean of their BI.

    Source: Lin et al. 2024 (MoDeGPT), arXiv:2408.09632, section 3.3, "global sparsity allocation"; BI as Men et al.
    2024 (ShortGPT), arXiv:2403.03853, equation 1. There t is such that the mean of φ is the sparsity asked for; here,
    such that the budget is met.
    """

    epsilon: float = 0.1  # the temperature ε, above 0
    needs_budget = True
    needs = frozenset({Statistic.COSINE})

    def __post_init__(self) -> None:
        if not 0 < self.epsilon < math.inf:
            raise ValueError("epsilon must be above 0 and finite")

    def allocate(self, spectra: Spectra, cost: Bill, budget: float | None) -> Mapping[Space, int]:
        assert budget is not None
        assert cost.influence is not None
        least = min(cost.influence[s] for s in spectra)
        weight = {s: math.exp((least - cost.influence[s]) / self.epsilon) for s in spectra}
        return scaled(weight, cost, budget)
