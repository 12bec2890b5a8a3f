"""Selector `global_energy`: water-filling on the spectra under one budget."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float64
from torch import Tensor

from invariance.budget import Bill
from invariance.interfaces import Selector
from invariance.space import Space


@dataclass(frozen=True)
class GlobalEnergy(Selector, name="global_energy"):
    """Take from every space the directions that hold the least of its energy per parameter they cost.

    One level for all spaces: the directions between one allowed width and the next that hold the least share of
    their space's energy per unit of budget go first, until the budget is met.

    Source: reverse water-filling (Cover and Thomas, Elements of Information Theory, section 10.3.3), with what a
    direction costs as its price.
    """

    needs_spectra = True
    needs_budget = True

    def allocate(
        self, spectra: Mapping[Space, Float64[Tensor, "c d"] | None], cost: Bill, budget: float | None
    ) -> Mapping[Space, int]:
        assert budget is not None
        shares = {
            s: (e.sum(0) / e.sum().clamp_min(1e-300)).tolist() for s, e in spectra.items() if e is not None
        }
        widths = {s: cost.widths[s][-1] for s in shares}
        spent = cost(widths)
        queue: list[tuple[float, int, Space, int]] = []

        def offer(order: int, space: Space) -> None:
            """Queue the next cut of a space, at its price as the widths stand now."""
            smaller = cost.narrower(space, widths[space])
            if smaller is not None:
                saved = spent - cost({**widths, space: smaller})
                lost = sum(shares[space][smaller : widths[space]])
                heapq.heappush(queue, (lost / saved if saved > 0 else float("inf"), order, space, smaller))

        for order, space in enumerate(widths):
            offer(order, space)
        while spent > budget and queue:
            _, order, space, smaller = heapq.heappop(queue)
            widths[space] = smaller
            spent = cost(widths)
            offer(order, space)
        return widths
