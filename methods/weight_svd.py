"""Rotator `weight_svd`: the singular directions of one matrix, whitened by its inputs."""

from __future__ import annotations

from dataclasses import dataclass

from invariance.calibrate.moments import Moments
from invariance.calibrate.statistic import Statistic
from invariance.core.change import Basis
from invariance.core.group import Group
from invariance.core.space import Space
from invariance.method.interfaces import Rotator

from .head_svd import whitened


@dataclass(frozen=True)
class WeightSVD(Rotator, name="weight_svd"):
    """Directions inside one matrix by the energy that they send to its outputs.

    W = W₂ W₁ is split in two, y = W₁ x lies between them, C = E[y yᵀ] and G = W₂ᵀW₂. Keeping k columns of A = C^-½ V,
    where G^½ C^½ = U Σ Vᵀ, minimises E‖W x − W' x‖² over all W' of rank k. Energies are Σ². Exact while k = d.

    Source: Wang et al. 2024 (SVD-LLM), arXiv:2403.07378, section 3.1, truncation-aware data whitening: there W S with
    S Sᵀ = E[x xᵀ] is cut, which has the same singular values, and the same best W'.
    """

    floor: float = 1e-9  # eigenvalues of C below this fraction of the largest are raised to it
    produces = Group.INVERTIBLE
    kinds = frozenset({"edge"})
    needs = frozenset({Statistic.RAW, Statistic.READERS})

    def __post_init__(self) -> None:
        if not 0 < self.floor < 1:
            raise ValueError("floor must be between 0 and 1")

    def fit(self, space: Space, moments: Moments) -> Basis:
        return whitened(moments.second(space), moments.second(space, Statistic.READERS), self.floor)
