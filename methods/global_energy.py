"""Selector `global_energy`: water-filling on the spectra under one budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from invariance.core.space import Space
from invariance.method.budget import Bill
from invariance.method.interfaces import Selector

from ._spend import Of, Spectra, spectral, water_fill


@dataclass(frozen=True)
class GlobalEnergy(Selector, name="global_energy"):
    """Take from every space the directions that hold the least of its energy per parameter they cost.

    One level for all spaces: the directions between one allowed width and the next that hold the least energy per unit
    of budget go first, until the budget is met. ``of: share`` counts shares of each space's energy; ``of: absolute``
    energies as they are, which is right where a rotator's energies are in one currency, such as nats.

    Source: reverse water-filling (Cover and Thomas, Elements of Information Theory, section 10.3.3), with what a
    direction costs as its price.
    """

    of: Of = "share"  # share (of each space's energy) or absolute
    needs_spectra = True
    needs_budget = True

    @property
    def compares(self) -> bool:
        return self.of == "absolute"

    def allocate(self, spectra: Spectra, cost: Bill, budget: float | None) -> Mapping[Space, int]:
        assert budget is not None
        return water_fill(spectral(spectra, cost, self.of), cost, budget)
