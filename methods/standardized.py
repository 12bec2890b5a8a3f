"""Selector `standardized`: one threshold for the scores of all spaces, each on its own scale."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float64
from torch import Tensor

from invariance.core.space import Space
from invariance.method.budget import Bill
from invariance.method.interfaces import Selector

from ._spend import energies


@dataclass(frozen=True)
class Standardized(Selector, name="standardized"):
    """Keep, in every space, the directions whose energy stands out among those of their space.

    Energies become scores z = (e − mean)/standard deviation over the directions of a space, copies summed, so that spaces
    whose energies are of different size, MLPs and heads among them, compare. The directions of lowest score go, whatever
    they cost, until the budget is met; widths are then rounded down to allowed ones. Directions of equal energy score 0.

    Source: An et al. 2023 (FLAP), arXiv:2312.11983, section "Adaptive Structure Search", across layers and modules.
    """

    needs_spectra = True
    needs_budget = True

    def allocate(
        self,
        spectra: Mapping[Space, Float64[Tensor, "c d"] | None],
        cost: Bill,
        budget: float | None,
    ) -> Mapping[Space, int]:
        assert budget is not None
        found = {space: scores(e) for space, e in energies(spectra, "absolute").items()}
        levels = [-math.inf, *sorted({z for values in found.values() for z in values})]

        def above(level: float) -> dict[Space, int]:
            return {
                s: cost.rounded(s, sum(z > level for z in values)) for s, values in found.items()
            }

        n = bisect_left(levels, True, key=lambda level: cost(above(level)) <= budget)
        return above(levels[min(n, len(levels) - 1)])


def scores(energy: list[float]) -> list[float]:
    """(e − mean)/standard deviation of each; 0 where all are equal."""
    mean = sum(energy) / len(energy)
    deviation = math.sqrt(sum((e - mean) ** 2 for e in energy) / len(energy))
    return [(e - mean) / deviation if deviation > 1e-12 * abs(mean) else 0.0 for e in energy]
