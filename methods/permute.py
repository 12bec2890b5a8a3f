"""Rotator `permute`: channels in order of how much they matter."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from invariance.interfaces import Rotator, Statistic
from invariance.moments import Moments
from invariance.space import Basis, Group, Space

from ._order import by_energy


@dataclass(frozen=True)
class Permute(Rotator, name="permute"):
    """Channels by falling E[x_j²]·‖W_j‖²: the energy that channel j sends through its readers' columns W_j.

    The one change that an elementwise activation admits; with `slice: least_squares` the readers make up for the
    channels that go.

    Source: the score of Wanda, Sun et al. 2023, arXiv:2306.11695, equation 1, squared and summed over a column.
    """

    produces = Group.PERMUTATION
    needs = frozenset({Statistic.SEEN, Statistic.READERS})

    def fit(self, space: Space, moments: Moments) -> Basis:
        signal = moments.second(space, Statistic.SEEN).diagonal(dim1=-2, dim2=-1)
        readers = moments.second(space, Statistic.READERS).diagonal(dim1=-2, dim2=-1)
        eye = torch.eye(space.dim, dtype=torch.float64).repeat(space.copies, 1, 1)
        return by_energy(eye, signal * readers)
