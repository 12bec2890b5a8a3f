"""Rotator `identity`: the basis that is there."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from invariance.calibrate.moments import Moments
from invariance.core.change import Basis
from invariance.core.group import Group
from invariance.core.pick import Pick
from invariance.core.space import Space
from invariance.method.interfaces import Rotator


@dataclass(frozen=True)
class Identity(Rotator, name="identity"):
    """The basis that is there: the baseline against which every other is judged.

    All directions count alike, so slicing keeps the first k. No calibration.
    """

    produces = Group.IDENTITY
    kinds = Rotator.kinds | {"heads"}

    def fit(self, space: Space, moments: Moments) -> Basis:
        same = Pick.first(space.copies, space.dim)
        return Basis(same, torch.ones(space.copies, space.dim, dtype=torch.float64))
