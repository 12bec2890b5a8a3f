"""Selector `greedy`: the marginal scan."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from invariance.core.space import Space
from invariance.method.budget import Bill, Predicted
from invariance.method.interfaces import Selector

from ._spend import Of, Spectra, least_cut, overdrawn, saving, spectral


@dataclass(frozen=True)
class Greedy(Selector, name="greedy"):
    """Take, again and again, the step that loses least per unit of budget that it saves, until the budget is met.

    A step takes the fraction ``step`` of one space's directions. What it loses is read off the spectra (``loss:
    spectra``), or measured on held-out sequences with all cuts so far in place (``loss: measured``), so that cuts which
    hurt each other are seen; what it saves is counted at the widths as they stand. Prices are looked at again
    when a step comes up and only then: a step whose price fell since is taken late, one whose price rose is not taken
    early. The last step is no longer than the budget asks.

    Source: the non-uniform variant that a review of SliceGPT (Ashkboos et al. 2024, arXiv:2401.15024) proposes: least
    truncation error per parameter removed, or a scan with validation in the loop. Lazy prices: Minoux 1978.
    """

    loss: Literal["spectra", "measured"] = (
        "spectra"  # spectra, or measured on held-out sequences at every step
    )
    of: Of = "share"  # of spectra: share (of each space's energy) or absolute
    step: float = 0.05  # the fraction of a space's directions that a step takes

    def __post_init__(self) -> None:
        if not 0 < self.step <= 1:
            raise ValueError("step must be above 0 and at most 1")
        if self.loss == "measured" and self.of != "share":
            raise ValueError("`of` is about spectra: remove it, or `loss: measured`")

    needs_budget = True

    @property
    def compares(self) -> bool:
        return self.of == "absolute"

    @property
    def measures(self) -> bool:
        return self.loss == "measured"

    @property
    def needs_spectra(self) -> bool:
        return self.loss == "spectra"

    def allocate(self, spectra: Spectra, cost: Bill, budget: float | None) -> Mapping[Space, int]:
        assert budget is not None
        loss = self._loss(spectra, cost)
        widths, queue = cost.whole, list[tuple[float, float, int, int]]()
        spaces, over = list(widths), overdrawn(cost, widths, budget)

        def offer(n: int) -> None:
            """Queue the next step of a space at its price as things stand."""
            space = spaces[n]
            if (smaller := cost.narrower(space, widths[space])) is None:
                return
            target = min(
                smaller, cost.rounded(space, space.share(space.fraction(widths[space]) - self.step))
            )
            k = least_cut(space, target, widths, cost, budget)
            after = {**widths, space: k}
            saved, lost = saving(cost, after, over), loss(after) - loss(widths)
            heapq.heappush(queue, (lost / saved if saved > 0 else math.inf, lost, n, k))

        for n in range(len(spaces)):
            offer(n)
        while over and queue:
            *_, n, _ = heapq.heappop(queue)
            offer(n)
            if queue[0][2] != n:  # no longer the cheapest
                continue
            *_, k = heapq.heappop(queue)
            widths[spaces[n]] = k
            before, over = over.keys(), overdrawn(cost, widths, budget)
            if over.keys() == before:
                offer(n)
            elif over:  # other prices
                queue.clear()
                for m in range(len(spaces)):
                    offer(m)
        return Predicted(widths, loss(widths) - loss(cost.whole)) if self.measures else widths

    def _loss(self, spectra: Spectra, cost: Bill) -> Callable[[Mapping[Space, int]], float]:
        if self.measures:
            assert cost.loss is not None
            return cost.loss
        curves = spectral(spectra, cost, self.of)
        return lambda widths: sum(curves[s][k] for s, k in widths.items())
