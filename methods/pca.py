"""Rotator `pca`: principal axes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from invariance.interfaces import Rotator, Statistic
from invariance.moments import Moments
from invariance.space import Basis, Group, Space


@dataclass(frozen=True)
class PCA(Rotator, name="pca"):
    """Principal axes of the signal on a space, by decreasing energy.

    With C = E[x xᵀ] = Q Λ Qᵀ, keeping the first k columns of Q minimises E‖x − Q_k Q_kᵀ x‖² over all rank-k
    orthogonal projections. ``of: raw`` takes tokens as they are (SliceGPT's released code), ``of: normed`` at unit
    RMS, as the readers of the residual stream see them (SliceGPT's paper). Exact while k = d.

    Source: Ashkboos et al. 2024, arXiv:2401.15024, section 3.3.
    """

    of: Literal["raw", "normed"] = "raw"
    produces = Group.ORTHOGONAL

    @property
    def needs(self) -> frozenset[Statistic]:
        return frozenset({Statistic(self.of)})

    def fit(self, space: Space, moments: Moments) -> Basis:
        energy, Q = torch.linalg.eigh(moments.second(space, self.of))
        return Basis(Q.flip(-1), energy.flip(-1).clamp_min(0))  # eigh ascends; slicers keep from the left
