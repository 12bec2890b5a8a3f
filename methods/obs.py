"""Rotator `obs`: the channels that the optimal brain surgeon takes last come first."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from invariance.calibrate.moments import Moments
from invariance.core.change import Basis
from invariance.core.group import Group
from invariance.core.linalg import inverse_, part_
from invariance.core.space import Space

from ._channels import Weighing, damped_, ordered


@dataclass(frozen=True)
class OBS(Weighing, name="obs"):
    """Channels taken out by least loss ‖W_j‖² / (C⁻¹)_jj, in rounds; what stays makes up for what went in between.

    The score is what is lost when channel j goes and the readers W are refit. After each of ``rounds`` equal groups,
    W and C⁻¹ become those of the channels that stay. Energies are exact for the order found: what is lost when a
    channel goes after all behind it, the readers refit (made for `slice: least_squares`).

    Source: Kurtic et al. 2023 (ZipLM), arXiv:2302.04089; Ling et al. 2024 (SlimGPT), arXiv:2412.18110;
    Hassibi and Stork 1992.
    """

    ridge: float = 1e-3  # added to C, as a fraction of its mean diagonal entry
    rounds: int = 4  # groups in which channels go
    produces = Group.PERMUTATION
    nested = refits = True

    def __post_init__(self) -> None:
        if not self.ridge > 0:
            raise ValueError("ridge must be above 0")
        if self.rounds < 1:
            raise ValueError("rounds must be at least 1")

    def fit(self, space: Space, moments: Moments) -> Basis:
        order = self._order(*self.weighed(space, moments))
        return ordered(order, *self.weighed(space, moments))

    def _order(
        self, C: Float64[Tensor, "c d d"], G: Float64[Tensor, "c d d"]
    ) -> Int[Tensor, "c d"]:
        inverse = inverse_(damped_(C, self.ridge))
        each = zip(inverse, G, strict=True)
        return torch.stack([survival(P, g, self.rounds) for P, g in each])


def survival(
    P: Float64[Tensor, "d d"], G: Float64[Tensor, "d d"], rounds: int
) -> Int[Tensor, " d"]:
    """The channels, those that stay longest first; P = C⁻¹, G = WᵀW, both used up."""
    alive, gone = torch.arange(len(G)), []
    for group in alive.tensor_split(rounds):
        ascending = (G.diagonal() / P.diagonal()).argsort(stable=True)
        out, stay = ascending[: len(group)], ascending[len(group) :].sort()[0]
        gone.append(alive[out])
        alive = alive[stay]
        if not len(stay):
            break
        P, G = without(P, G, out, stay)
    return torch.cat(gone).flip(0)


def without(
    P: Float64[Tensor, "d d"],
    G: Float64[Tensor, "d d"],
    out: Int[Tensor, " s"],
    stay: Int[Tensor, " r"],
) -> tuple[Float64[Tensor, "r r"], Float64[Tensor, "r r"]]:
    """C⁻¹ and WᵀW of the channels that stay, their readers refit.

    With T = −P_oo⁻¹ P_os, W becomes W_s + W_o T, so WᵀW becomes G_ss + X T + (X T)ᵀ with X = G_so + ½ Tᵀ G_oo, and
    C_ss⁻¹ is P_ss + P_so T (Schur). P and G are used up.
    """
    o = out[:, None]
    lost = P[o, stay]
    T = -torch.cholesky_solve(lost, torch.linalg.cholesky(P[o, out]))
    X = G[stay[:, None], out].addmm_(T.mT, G[o, out], alpha=0.5)
    P, G = part_(P, stay).addmm_(lost.mT, T), part_(G, stay)
    return P, G.addmm_(X, T).addmm_(T.mT, X.mT)
