"""Selector `global_energy`: water-filling on the spectra under one budget."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from jaxtyping import Float64
from torch import Tensor

from invariance.errors import InputError
from invariance.interfaces import Selector
from invariance.space import Space

from ._widths import rounded


@dataclass(frozen=True)
class GlobalEnergy(Selector, name="global_energy"):
    """Take from every space the directions that hold the least of its energy per parameter they cost.

    One level for all spaces: the last ``multiple_of`` directions with the least share of their space's energy per
    parameter saved go first, until the recipe's budget of stored parameters is met. ``floor`` is the least share of
    a space's directions that stays.

    Source: reverse water-filling (Cover and Thomas, Elements of Information Theory, section 10.3.3), with the
    parameters that a direction stores as its price.
    """

    multiple_of: int = 8
    floor: float = 0.1
    needs_spectra = True
    needs_budget = True

    def __post_init__(self) -> None:
        if self.multiple_of < 1:
            raise ValueError("multiple_of must be at least 1")
        if not 0 < self.floor <= 1:
            raise ValueError("floor must be above 0 and at most 1")

    def allocate(
        self,
        spectra: Mapping[Space, Float64[Tensor, "c d"] | None],
        cost: Callable[[Mapping[Space, int]], int],
        budget: int | None,
    ) -> Mapping[Space, int]:
        assert budget is not None
        shares = {
            s: (e.sum(0) / e.sum().clamp_min(1e-300)).tolist() for s, e in spectra.items() if e is not None
        }
        widths = {s: s.dim for s in shares}
        spent = cost(widths)
        queue: list[tuple[float, int, Space, int, int]] = []

        def offer(order: int, space: Space) -> None:
            """Queue the next cut of a space, at its price per parameter as the widths stand now."""
            k = widths[space]
            smaller = rounded(k - 1, space, self.multiple_of)
            if smaller < k and smaller >= self.floor * space.dim:
                saved = spent - cost({**widths, space: smaller})
                lost = sum(shares[space][smaller:k])
                heapq.heappush(queue, (lost / saved if saved > 0 else float("inf"), order, space, k, smaller))

        for order, space in enumerate(widths):
            offer(order, space)
        while spent > budget:
            if not queue:
                raise InputError(
                    f"the budget of {budget:,} parameters cannot be met: these spaces at their narrowest leave "
                    f"{spent:,}. Raise the budget, lower `floor`, or cut more spaces."
                )
            _, order, space, _, smaller = heapq.heappop(queue)
            widths[space] = smaller
            spent = cost(widths)
            offer(order, space)
        return widths
