"""Rotator `head_svd`: the whitened singular directions of a head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from invariance.calibrate.moments import Moments
from invariance.core.change import Basis
from invariance.core.group import Group
from invariance.core.linalg import svd
from invariance.core.space import Space

from ._channels import Weighing


@dataclass(frozen=True)
class HeadSVD(Weighing, name="head_svd"):
    """Directions of each KV head by the energy they send through the output projection.

    With C = Σ E[z zᵀ] of the mixed values z that the output projection reads, over the query heads of a group, and
    G = WᵀW of one of those heads, on average, keeping k columns of A = C^-½ V, where G^½ C^½ = U Σ Vᵀ, minimises
    tr (I − P) C (I − P)ᵀ G over all projections P of rank k. Energies are Σ². Exact while k = d. ``metric: fisher``
    puts ½F in the place of G, F the output-KL Fisher of one of the heads, on average; energies are nats a token then.

    Source: Lin et al. 2024 (MoDeGPT), arXiv:2408.09632, algorithm 3, with the output's moment in place of the
    input's, so that attention's mixing counts.
    """

    floor: float = 1e-9  # eigenvalues of C below this fraction of the largest are raised to it
    produces = Group.INVERTIBLE
    kinds = frozenset({"vo"})

    def __post_init__(self) -> None:
        if not 0 < self.floor < 1:
            raise ValueError("floor must be between 0 and 1")

    def fit(self, space: Space, moments: Moments) -> Basis:
        return whitened(*self.weighed(space, moments), self.floor)


def whitened(C: Float64[Tensor, "c d d"], G: Float64[Tensor, "c d d"], floor: float) -> Basis:
    """The basis A = C^-½ V and the energies Σ² of G^½ C^½ = U Σ Vᵀ."""
    half, inverse = _root(C, floor)
    G_half, _ = _root(G, 1e-15)
    _, sigma, Vt = svd(G_half @ half)
    return Basis(inverse @ Vt.mT, sigma.square())


def _root(C: torch.Tensor, floor: float) -> tuple[torch.Tensor, torch.Tensor]:
    """C^½ and C^-½ of a positive semi-definite matrix, its eigenvalues floored."""
    values, Q = torch.linalg.eigh(C)
    values = values.clamp_min(floor * values.amax(-1, keepdim=True)).clamp_min(
        torch.finfo(C.dtype).tiny
    )
    root = values.sqrt().unsqueeze(-2)
    return (Q * root) @ Q.mT, (Q / root) @ Q.mT
