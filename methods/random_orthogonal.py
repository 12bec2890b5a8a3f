"""Rotator `random_orthogonal`: Haar measure."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from invariance.calibrate.moments import Moments
from invariance.core.change import Basis
from invariance.core.group import Group
from invariance.core.space import Space, haar
from invariance.method.interfaces import Rotator


@dataclass(frozen=True)
class RandomOrthogonal(Rotator, name="random_orthogonal"):
    """An orthogonal matrix from Haar measure, the same for the same seed and space. No calibration.

    The ``seed`` is the recipe's unless given here. All directions count alike: a sliced random basis shows what a
    basis is worth that knows nothing.

    Source: Mezzadri 2007, arXiv:math-ph/0609050 (through scipy.stats.ortho_group).
    """

    seed: int | None = None  # null: the recipe's
    produces = Group.ORTHOGONAL

    def fit(self, space: Space, moments: Moments) -> Basis:
        g = space.generator(self.seed or 0)
        A = torch.stack([haar(space.dim, g) for _ in range(space.copies)])
        return Basis(A, torch.ones(space.copies, space.dim, dtype=torch.float64))
