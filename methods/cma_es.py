"""Selector `cma_es`: evolution of the widths by their measured loss."""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from invariance.core.errors import InputError
from invariance.core.space import Space
from invariance.method.budget import Bill, Predicted
from invariance.method.interfaces import Selector

from ._spend import WORST, Of, Spectra, scaled
from .global_energy import GlobalEnergy


@dataclass(frozen=True)
class CMAES(Selector, name="cma_es"):
    """Search the widths of least held-out loss with an evolution strategy that learns which spaces trade against which.

    A point holds one sparsity a space; its widths are (1 - t φ) d, with the least t that meets the budget, and its loss
    is measured on held-out sequences. The search begins at the widths of `global_energy`, and the best choice that it
    met is taken, those included: it is never worse than where it began, on those sequences. Measured losses are
    kept on disk, and everything else follows from the seed, so that an interrupted search goes on where it was.

    Source: Hansen 2016, "The CMA evolution strategy: a tutorial", arXiv:1604.00772, as the package `cma` does it.
    """

    evaluations: int = (
        100  # how many choices are measured at most: the first, then whole generations
    )
    of: Of = (
        "share"  # of which energies global_energy makes the widths to begin with: share or absolute
    )
    sigma: float = (
        0.1  # the standard deviation of the first sparsities around those of global_energy
    )
    seed: int | None = None  # of what is random; null for the recipe's
    needs_spectra = True
    needs_budget = True
    measures = True

    def __post_init__(self) -> None:
        if self.evaluations < 1:
            raise ValueError("evaluations must be at least 1")
        if not 0 < self.sigma <= 1:
            raise ValueError("sigma must be above 0 and at most 1")
        if importlib.util.find_spec("cma") is None:
            raise InputError(
                "the package `cma` is not installed. Run `pip install 'invariance[search]'`, or use another selector"
            )

    @property
    def compares(self) -> bool:
        return self.of == "absolute"

    def allocate(self, spectra: Spectra, cost: Bill, budget: float | None) -> Mapping[Space, int]:
        assert budget is not None
        assert cost.loss is not None
        start = GlobalEnergy(of=self.of).allocate(spectra, cost, budget)
        spaces = list(start)
        losses: dict[tuple[int, ...], float] = {}

        def loss(widths: Mapping[Space, int]) -> float:
            point = tuple(widths[s] for s in spaces)
            if point not in losses:
                assert cost.loss is not None
                losses[point] = cost.loss(widths)
            return min(losses[point], WORST)

        loss(start)
        if len(spaces) > 1 and start != cost.whole:  # else the budget leaves nothing to search
            search = _strategy(
                [1 - s.fraction(start[s]) for s in spaces], self.sigma, self.seed or 0
            )
            for _ in range((self.evaluations - 1) // search.popsize):
                if search.stop():
                    break
                points = search.ask()
                choices = [
                    scaled(dict(zip(spaces, map(float, x), strict=True)), cost, budget)
                    for x in points
                ]
                search.tell(points, [loss(widths) for widths in choices])
        best = min(losses, key=lambda point: losses[point])
        return Predicted(dict(zip(spaces, best, strict=True)), losses[best] - cost.loss({}))


def _strategy(x0: list[float], sigma: float, seed: int) -> Any:
    """The package's strategy, with random numbers of its own; numpy's global ones are left as they are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it would like to plot
        import cma
    random = np.random.default_rng(seed)
    options = {
        "bounds": [0, 1],
        "randn": lambda *shape: random.standard_normal(shape),
        "seed": math.nan,  # which means: leave numpy's global seed alone
        "verbose": -9,
    }
    return cma.CMAEvolutionStrategy(x0, sigma, options)
