"""Rotator `permute`: channels in order of how much they matter."""

from __future__ import annotations

from dataclasses import dataclass

from invariance.interfaces import Rotator, Statistic
from invariance.moments import Moments
from invariance.space import Basis, Group, Space

from ._channels import Metric, identity, statistics, weighing
from ._order import by_energy


@dataclass(frozen=True)
class Permute(Rotator, name="permute"):
    """Channels by falling E[x_j²]·‖W_j‖²: the energy that channel j sends through its readers' columns W_j.

    The one change that an elementwise activation admits; with `slice: least_squares` the readers make up for the
    channels that go. ``metric: fisher`` weighs by nats a token in place of ‖W_j‖²: ½F_jj, F the output-KL Fisher.

    Source: the score of Wanda, Sun et al. 2023, arXiv:2306.11695, equation 1, squared and summed over a column.
    """

    metric: Metric = "readers"  # what an error costs: its energy behind the readers, or nats by the fisher
    produces = Group.PERMUTATION

    @property
    def needs(self) -> frozenset[Statistic]:  # type: ignore[override]
        return statistics(self.metric)

    @property
    def nats(self) -> bool:  # type: ignore[override]
        return self.metric == "fisher"

    def fit(self, space: Space, moments: Moments) -> Basis:
        C, G = weighing(space, moments, self.metric)
        energy = C.diagonal(dim1=-2, dim2=-1) * G.diagonal(dim1=-2, dim2=-1)
        return by_energy(identity(space), energy)
