"""What selectors share: loss curves of spaces, and ways to spend exactly what a budget allows."""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Mapping
from typing import Literal

import numpy as np
from jaxtyping import Float64
from scipy.interpolate import PchipInterpolator
from torch import Tensor

from invariance.core.space import Space
from invariance.method.budget import Bill, Predicted

Of = Literal["share", "absolute"]
Spectra = Mapping[Space, Float64[Tensor, "c d"] | None]
Curves = Mapping[
    Space, Mapping[int, float]
]  # space → allowed width → the loss of cutting it alone, rising as it narrows
WORST = 1e3  # nats: what an infinite loss counts as, so that curves can be drawn through it


def energies(spectra: Spectra, of: Of) -> dict[Space, list[float]]:
    """Every direction's energy, copies summed; as shares of its space's, or as they are."""
    found = {s: e.sum(0) for s, e in spectra.items() if e is not None}
    scale = {s: e.sum().clamp_min(1e-300) if of == "share" else 1.0 for s, e in found.items()}
    return {s: (e / scale[s]).tolist() for s, e in found.items()}


def spectral(spectra: Spectra, cost: Bill, of: Of) -> Curves:
    """The energies beyond each width, above those beyond the widest one allowed."""
    curves = {}
    for space, e in energies(spectra, of).items():
        beyond = np.append(np.cumsum(np.array(e)[::-1])[::-1], 0.0)
        curves[space] = {
            k: float(beyond[k] - beyond[cost.widths[space][-1]]) for k in cost.widths[space]
        }
    return curves


def measured(cost: Bill, points: int) -> Curves:
    """The held-out loss of cutting each space alone, above that of cutting none, at ``points`` allowed widths.

    They lie where (n/points)² of what may go is gone: closer where little is cut. Between them the curve is drawn by
    the monotone cubic of Fritsch and Carlson; a loss below a wider cut's is raised to it.
    """
    assert cost.loss is not None
    dense = cost.loss({})
    curves = {}
    for space, allowed in cost.widths.items():
        top, span = allowed[-1], allowed[-1] - allowed[0]
        asked = {
            cost.rounded(space, top - span * (n / points) ** 2) for n in range(1, points + 1)
        } - {top}
        known = {top: 0.0}
        for k in sorted(asked, reverse=True):
            rise = min(cost.loss({space: k}) - dense, WORST)
            known[k] = max(rise, *known.values())
        widths = sorted(known)
        line = (
            PchipInterpolator(widths, [known[k] for k in widths])
            if len(widths) > 1
            else lambda x: 0 * x
        )
        values = line(np.array(allowed, dtype=float))
        curves[space] = {k: float(v) for k, v in zip(allowed, values, strict=True)}
    return curves


def predicted(widths: Mapping[Space, int], curves: Curves) -> Predicted[Space]:
    """Widths with the sum of their losses."""
    return Predicted(widths, sum(curves[s][k] for s, k in widths.items()))


def water_fill(curves: Curves, cost: Bill, budget: float) -> dict[Space, int]:
    """Cut one allowed width at a time, where the curves rise least per unit of budget, until the budget is met.

    A space's next cut is priced when the one before is made; all anew where another resource is met. What the last cut
    leaves unspent is spent (``fill``).
    """
    widths = cost.whole
    over = overdrawn(cost, widths, budget)
    queue: list[tuple[float, int, Space, int]] = []

    def offer(order: int, space: Space) -> None:
        """Queue the next cut of a space, at its price as the widths stand now."""
        smaller = cost.narrower(space, widths[space])
        if smaller is not None:
            saved = saving(cost, {**widths, space: smaller}, over)
            lost = curves[space][smaller] - curves[space][widths[space]]
            heapq.heappush(
                queue, (lost / saved if saved > 0 else float("inf"), order, space, smaller)
            )

    for order, space in enumerate(widths):
        offer(order, space)
    while over and queue:
        _, order, space, smaller = heapq.heappop(queue)
        widths[space] = smaller
        before, over = over.keys(), overdrawn(cost, widths, budget)
        if over.keys() == before:
            offer(order, space)
        elif over:
            queue.clear()
            for n, other in enumerate(widths):
                offer(n, other)
    return fill(widths, curves, cost, budget)


def overdrawn(
    cost: Bill, widths: Mapping[Space, int], budget: float
) -> dict[str, tuple[float, float]]:
    """The resources of which widths spend more than there is → how much they spend, and how much there is."""
    several = len(cost.amounts) > 1  # the budget is a share of each then
    limits = {r: budget * cost.limits[r] if several else budget for r in cost.amounts}
    spent = {r: cost.amounts[r](widths) for r in limits}
    return {r: (spent[r], limit) for r, limit in limits.items() if spent[r] > limit}


def saving(
    cost: Bill, after: Mapping[Space, int], over: Mapping[str, tuple[float, float]]
) -> float:
    """What narrower widths save of the resources that are overdrawn, as shares of what there is of each."""
    return sum((spent - cost.amounts[r](after)) / limit for r, (spent, limit) in over.items())


def fill(
    widths: Mapping[Space, int], curves: Curves, cost: Bill, budget: float
) -> dict[Space, int]:
    """Spend what is left: widen by one allowed width at a time, while one fits that lowers the loss; the one that
    lowers it most first. What does not fit once does not later, when more is spent."""
    chosen = dict(widths)
    queue: list[tuple[float, int, Space, int]] = []

    def offer(order: int, space: Space) -> None:
        k = chosen[space]
        wider = next((w for w in cost.widths[space] if w > k), k)
        gain = curves[space][k] - curves[space][wider]
        if gain > 0:
            heapq.heappush(queue, (-gain, order, space, wider))

    for order, space in enumerate(chosen):
        offer(order, space)
    while queue:
        _, order, space, wider = heapq.heappop(queue)
        if cost({**chosen, space: wider}) <= budget:
            chosen[space] = wider
            offer(order, space)
    return chosen


def least_cut(
    space: Space, target: int, widths: Mapping[Space, int], cost: Bill, budget: float
) -> int:
    """The widest allowed width of a space from ``target`` on that meets the budget, else ``target``."""
    between = [k for k in cost.widths[space] if target <= k < widths[space]][::-1]
    n = bisect_left(between, True, key=lambda k: cost({**widths, space: k}) <= budget)
    return between[min(n, len(between) - 1)]


def scaled(sparsities: Mapping[Space, float], cost: Bill, budget: float) -> dict[Space, int]:
    """The widths (1 - t φ) d of sparsities φ, rounded down to allowed ones, at the least t that meets the budget.

    Sparsities below 1e-6 count as that, so that what can be met is.
    """
    phi = {s: max(x, 1e-6) for s, x in sparsities.items()}

    def at(t: float) -> dict[Space, int]:
        return {s: cost.rounded(s, s.share(1 - t * x)) for s, x in phi.items()}

    steps = sorted(
        {0.0} | {(1 - s.fraction(k)) / x for s, x in phi.items() for k in cost.widths[s]}
    )
    n = bisect_left(steps, True, key=lambda t: cost(at(t)) <= budget)
    return at(steps[min(n, len(steps) - 1)])
