"""Rotator `asvd`: the singular directions of one matrix, its channels scaled by how large their signal is."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from invariance.calibrate.moments import Moments
from invariance.calibrate.statistic import Statistic
from invariance.core.change import Basis
from invariance.core.group import Group
from invariance.core.linalg import svd
from invariance.core.space import Space
from invariance.method.interfaces import Rotator

from .head_svd import _root


@dataclass(frozen=True)
class ASVD(Rotator, name="asvd"):
    """Directions inside one matrix by the SVD of W S, S = diag(RMS(y_j)^α): channels by their size, no correlations.

    W = W₂ W₁ is split in two and y = W₁ x lies between them: the inputs where the matrix has no more of them than
    outputs, else the outputs. Keeping k columns of A = S⁻¹ V, where (W₂ᵀW₂)^½ S = U Σ Vᵀ, makes of inputs
    W' = U_k Σ_k V_kᵀ S⁻¹, the best of rank k for signals with independent channels of RMS S. Energies are Σ². Exact while
    k = d. With the whole second moment in the place of S² it is `weight_svd`, which loses less; this one needs a size a
    channel.

    Source: Yuan et al. 2023 (ASVD), arXiv:2312.05821, section 3.2, with the mean square for the mean magnitude.
    """

    strength: float = 0.5  # α: how much the size of the signal counts, from 0 for the plain SVD
    produces = Group.INVERTIBLE
    kinds = frozenset({"edge"})
    needs = frozenset({Statistic.RAW, Statistic.READERS})

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 2:
            raise ValueError("strength must be from 0 to 2")

    def fit(self, space: Space, moments: Moments) -> Basis:
        power = moments.diagonal(space)
        floor = (1e-9 * power.amax(-1, keepdim=True)).clamp_min(torch.finfo(power.dtype).tiny)
        S = torch.maximum(power, floor) ** (self.strength / 2)
        G, _ = _root(moments.second(space, Statistic.READERS), 1e-15)
        _, sigma, Vt = svd(G * S.unsqueeze(-2))
        return Basis(Vt.mT / S.unsqueeze(-1), sigma.square())
