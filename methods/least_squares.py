"""Slicer `least_squares`: keep the first k directions and refit the readers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from invariance.calibrate.moments import Moments
from invariance.calibrate.statistic import Statistic
from invariance.core.change import Basis, Change
from invariance.core.dense import Dense
from invariance.core.linalg import solve_
from invariance.core.operator import Operator
from invariance.core.space import Space
from invariance.method.interfaces import Slicer


@dataclass(frozen=True)
class LeastSquares(Slicer, name="least_squares"):
    """Keep the first k directions, and let the readers make up for what is gone.

    With E the kept columns of A and C the second moment that the readers see, D = C E (EᵀC E + λI)⁻¹ minimises
    E‖x − D Eᵀx‖² + λ‖D‖², with λ = ridge × the mean diagonal entry of EᵀC E. On an MLP, where E picks channels, this
    is Nyström's and OBS's compensation; with principal axes it is `truncate`. On `heads` E picks KV groups, and every
    number that the kept ones give stands in for what all gave.

    Source: Lin et al. 2024 (MoDeGPT), arXiv:2408.09632, theorem 1; Hassibi and Stork 1992 for one channel at a time.
    """

    ridge: float = 1e-6
    kinds = Slicer.kinds | {"heads"}
    mixes = True
    needs = frozenset({Statistic.SEEN})

    def __post_init__(self) -> None:
        if not 0 <= self.ridge < 1:
            raise ValueError("ridge must be at least 0 and below 1")

    def cut(self, space: Space, basis: Basis, k: int, moments: Moments) -> Change:
        if k == space.dim:
            return Change.rotation(basis.A)
        E = basis.A.columns(torch.arange(k))
        whole = E.grained(space.grain)  # E ⊗ I, on all that a direction gives
        CE = moments.times(space, Statistic.SEEN, whole)
        try:
            D = solve_(self._ridged(CE, whole), CE)
        except torch.linalg.LinAlgError:  # rounding has made the moment indefinite
            D = torch.linalg.solve(self._ridged(CE, whole), CE.mT).mT.contiguous()
        return Change(E, Dense(D))

    def _ridged(self, CE: Float64[Tensor, "c n k"], E: Operator) -> Float64[Tensor, "c k k"]:
        """EᵀC E + λI."""
        S = (CE.mT @ E).contiguous()
        diagonal = S.diagonal(dim1=-2, dim2=-1)
        scale = diagonal.mean(-1, keepdim=True).clamp_min(torch.finfo(S.dtype).tiny)
        diagonal.add_(max(self.ridge, 1e-14) * scale)
        return S
