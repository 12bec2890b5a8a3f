"""Rotator `reap`: experts by how much they add to the tokens that choose them."""

from __future__ import annotations

from dataclasses import dataclass

from invariance.calibrate.moments import Moments
from invariance.calibrate.statistic import Statistic
from invariance.core.change import Basis
from invariance.core.group import Group
from invariance.core.pick import Pick
from invariance.core.space import Space
from invariance.method.interfaces import Rotator

from ._order import by_energy


@dataclass(frozen=True)
class Reap(Rotator, name="reap"):
    """Experts by falling S_j = E[g_j(x)·‖f_j(x)‖ | x chooses j], g_j the router's weight, f_j(x) the expert's output.

    The experts that add least go, whole, and the router chooses among those that stay. An expert that few tokens choose
    stays where it adds much to them. Made for `slice: truncate`: nothing is merged.

    Source: Lasby et al. 2025 (REAP), arXiv:2510.13999, the saliency of an expert.
    """

    produces = Group.PERMUTATION
    kinds = frozenset({"experts"})
    needs = frozenset({Statistic.EXPERTS})

    def fit(self, space: Space, moments: Moments) -> Basis:
        score = moments.second(space, Statistic.EXPERTS).diagonal(dim1=-2, dim2=-1)
        return by_energy(Pick.first(space.copies, space.dim), score)
