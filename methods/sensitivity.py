"""Selector `sensitivity`: measured loss of cutting each space alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from invariance.core.space import Space
from invariance.method.budget import Bill
from invariance.method.interfaces import Selector

from ._spend import Spectra, measured, predicted, water_fill


@dataclass(frozen=True)
class Sensitivity(Selector, name="sensitivity"):
    """Cut where the held-out loss rises least, as measured by cutting each space alone.

    Every space is cut alone to a few widths, by the bases and moments of the dense model, and the next-token
    cross-entropy of held-out calibration sequences is measured. The curves through these points are spent as
    `global_energy` spends spectra: the next cut with the least loss per unit of budget goes first. The loss that is
    predicted is the sum over the spaces.

    Source: the sensitivity scan of Li et al. 2017, arXiv:1608.08710, section 3.2, with one budget and least squares or
    whatever else the step's slicer does; the seed of `dynamic_programming`, which spends the same curves optimally.
    """

    points: int = 3  # at how many widths each space is measured
    needs_budget = True
    measures = True

    def __post_init__(self) -> None:
        if self.points < 1:
            raise ValueError("points must be at least 1")

    def allocate(self, spectra: Spectra, cost: Bill, budget: float | None) -> Mapping[Space, int]:
        assert budget is not None
        curves = measured(cost, self.points)
        return predicted(water_fill(curves, cost, budget), curves)
