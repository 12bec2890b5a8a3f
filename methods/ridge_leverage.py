"""Rotator `ridge_leverage`: channels that others cannot stand in for come first."""

from __future__ import annotations

from dataclasses import dataclass

from invariance.calibrate.moments import Moments
from invariance.calibrate.statistic import Statistic
from invariance.core.change import Basis
from invariance.core.group import Group
from invariance.core.linalg import inverse_
from invariance.core.space import Space
from invariance.method.interfaces import Rotator

from ._channels import damped_, damping, ordered


@dataclass(frozen=True)
class RidgeLeverage(Rotator, name="ridge_leverage"):
    """Channels by falling leverage [C (C + λI)⁻¹]_jj: how much of channel j the others do not know.

    C = E[x xᵀ] and λ = ridge × its mean diagonal entry. What the readers do does not enter the order; an energy is
    what they lose when a channel goes after all behind it, refit by least squares (made for `slice: least_squares`).

    Source: Lin et al. 2024 (MoDeGPT), arXiv:2408.09632, algorithm 1.
    """

    ridge: float = 1e-2  # λ as a fraction of the mean energy of a channel
    produces = Group.PERMUTATION
    needs = frozenset({Statistic.SEEN, Statistic.READERS})
    nested = refits = True

    def __post_init__(self) -> None:
        if not self.ridge > 0:
            raise ValueError("ridge must be above 0")

    def fit(self, space: Space, moments: Moments) -> Basis:
        C = moments.second(space, Statistic.SEEN)
        damp = damping(C, self.ridge)
        unknown = damp * inverse_(damped_(C, self.ridge)).diagonal(dim1=-2, dim2=-1)
        order = unknown.argsort(dim=-1, stable=True)  # 1 less it is the leverage
        C = moments.second(space, Statistic.SEEN)
        return ordered(order, C, moments.second(space, Statistic.READERS))
