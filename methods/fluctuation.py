"""Rotator `fluctuation`: channels in order of how much they vary."""

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
class Fluctuation(Rotator, name="fluctuation"):
    """Channels by falling Var[x_j]·‖W_j‖²: the energy behind the readers that a constant in its place would lose.

    Made for `slice: bias_compensation`, which puts that constant into the readers' biases. On `heads`, the sum over all
    that a KV group gives to the output projection.

    Source: An et al. 2023 (FLAP), arXiv:2312.11983, its weighted input feature variance.
    """

    produces = Group.PERMUTATION
    kinds = frozenset({"mlp", "heads"})
    needs = frozenset({Statistic.RAW, Statistic.MEAN, Statistic.READERS})

    def fit(self, space: Space, moments: Moments) -> Basis:
        variance = moments.diagonal(space) - moments.mean(space).square()
        readers = moments.diagonal(space, Statistic.READERS)
        energy = (variance.clamp_min(0) * readers).unflatten(-1, (space.dim, space.grain)).sum(-1)
        return by_energy(Pick.first(space.copies, space.dim), energy)
