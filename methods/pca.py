"""Rotator `pca`: principal axes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from invariance.calibrate.moments import Moments
from invariance.calibrate.statistic import Statistic
from invariance.core.change import Basis
from invariance.core.group import Group
from invariance.core.space import Space
from invariance.method.interfaces import Rotator


@dataclass(frozen=True)
class PCA(Rotator, name="pca"):
    """Principal axes of the signal on a space, by decreasing energy.

    With C = E[x xᵀ] = Q Λ Qᵀ, keeping the first k columns of Q minimises E‖x − Q_k Q_kᵀ x‖² over all rank-k
    orthogonal projections. ``of: raw`` takes tokens as they are (SliceGPT's released code), ``of: normed`` at unit
    RMS, as the readers of the residual stream see them (SliceGPT's paper). ``precision: float32`` finds Q in it and
    makes it orthogonal in float64, for ablations. Exact while k = d.

    Source: Ashkboos et al. 2024, arXiv:2401.15024, section 3.3.
    """

    of: Literal["raw", "normed"] = "raw"
    precision: Literal["float64", "float32"] = "float64"
    produces = Group.ORTHOGONAL

    @property
    def needs(self) -> frozenset[Statistic]:
        return frozenset({Statistic(self.of)})

    def fit(self, space: Space, moments: Moments) -> Basis:
        C = moments.second(space, self.of)
        energy, Q = torch.linalg.eigh(C.to(getattr(torch, self.precision)))
        if self.precision == "float32":  # orthogonal to 1e-7 only, and so no exact change of basis
            Q, R = torch.linalg.qr(Q.double())
            energy, Q = energy.double(), Q * R.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]
        return Basis(
            Q.flip(-1), energy.flip(-1).clamp_min(0)
        )  # eigh ascends; slicers keep from the left
