"""Rotator `permute`: channels in order of how much they matter."""

from __future__ import annotations

from dataclasses import dataclass

from invariance.calibrate.moments import Moments
from invariance.core.change import Basis
from invariance.core.group import Group
from invariance.core.pick import Pick
from invariance.core.space import Space

from ._channels import Weighing
from ._order import by_energy


@dataclass(frozen=True)
class Permute(Weighing, name="permute"):
    """Channels by falling E‖W_j x_j‖² = E[x_j²]·‖W_j‖²: what channel j sends through its readers' columns W_j.

    The one change that an elementwise activation admits; with `slice: least_squares` the readers make up for the
    channels that go. ``metric: fisher`` weighs by nats a token in place of ‖W_j‖²: ½F_jj, F the output-KL Fisher.
    On `heads`, x_j is all that KV group j gives to the output projection, and its energy tr(C_jj W_jᵀW_j).

    Source: the score of Wanda, Sun et al. 2023, arXiv:2306.11695, equation 1, squared and summed over a column.
    """

    produces = Group.PERMUTATION
    kinds = Weighing.kinds | {"heads"}

    def fit(self, space: Space, moments: Moments) -> Basis:
        C = moments.blocks(space, self.signal)
        G = self.cost(moments.blocks(space, self.reading))
        energy = (C * G).sum((-2, -1)).clamp_min(0)
        return by_energy(Pick.first(space.copies, space.dim), energy)
