"""What rotators share that put channels in order: how an error is weighed, and what cutting an order loses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from invariance.calibrate.moments import Moments
from invariance.calibrate.statistic import Statistic
from invariance.core.change import Basis
from invariance.core.linalg import cholesky_, reorder_
from invariance.core.pick import Pick
from invariance.core.space import Space
from invariance.method.interfaces import NATS, Rotator

Metric = Literal["readers", "fisher"]
WIDE = 256  # columns of a triangular factor that are multiplied together
NOISE = 1e-5  # of a channel's own energy: keeps the factor of a moment that rounding has made indefinite


@dataclass(frozen=True)
class Weighing(Rotator):
    """Rotators that order directions by what errors cost: their energy behind the readers, or nats a token."""

    metric: Metric = (
        "readers"  # what an error costs: its energy behind the readers, or nats by the fisher
    )

    @property
    def needs(self) -> frozenset[Statistic]:
        return frozenset({self.signal, self.reading})

    @property
    def unit(self) -> str:
        return NATS if self.metric == "fisher" else "energy behind the readers"

    def weighed(
        self, space: Space, moments: Moments
    ) -> tuple[Float64[Tensor, "c d d"], Float64[Tensor, "c d d"]]:
        """C and G such that an error e of the signal, of second moment C where it is lost, costs E[eᵀ G e].

        The Fisher's gradients fall where the stream behind is large, so tokens are weighted by 1/mean(y²) of it.
        """
        return moments.second(space, self.signal), self.cost(moments.second(space, self.reading))

    @property
    def signal(self) -> Statistic:
        """Of which C is the moment."""
        return Statistic.WEIGHTED if self.nats else Statistic.SEEN

    @property
    def reading(self) -> Statistic:
        """Of which G is the moment, up to ``cost``."""
        return Statistic.FISHER if self.nats else Statistic.READERS

    def cost(self, G: Tensor) -> Tensor:
        return G.div_(2) if self.nats else G


def damped_(C: Float64[Tensor, "c d d"], ridge: float) -> Float64[Tensor, "c d d"]:
    """C + λI in C's place, with λ = ridge × the mean diagonal entry."""
    C.diagonal(dim1=-2, dim2=-1).add_(damping(C, ridge))
    return C


def damping(C: Float64[Tensor, "c d d"], ridge: float) -> Float64[Tensor, "c 1"]:
    diagonal = C.diagonal(dim1=-2, dim2=-1)
    return ridge * diagonal.mean(-1, keepdim=True).clamp_min(torch.finfo(C.dtype).tiny)


def ordered(
    order: Int[Tensor, "c d"],
    C: Float64[Tensor, "c d d"],
    G: Float64[Tensor, "c d d"],
    noise: float = NOISE,
) -> Basis:
    """The channels in an order, and as energy j what is lost in addition when, all behind it gone, j goes too, while
    the readers are refit by least squares.

    With C = L Lᵀ in that order, x = L z and E[zzᵀ] = I; the first k channels span z_1 … z_k, so the best prediction
    of x from them leaves L_{k+1} z_{k+1} + … + L_d z_d, which costs Σ_{j>k} L_jᵀ G L_j: energy j is L_jᵀ G L_j.
    C and G are used up.
    """
    for M in (C, G):
        for m, o in zip(M, order, strict=True):
            reorder_(m, o)
    own = C.diagonal(dim1=-2, dim2=-1).clone()
    floor = own.amax(-1, keepdim=True).clamp_min(torch.finfo(C.dtype).tiny) * noise
    C.diagonal(dim1=-2, dim2=-1).add_(noise * torch.maximum(own, floor))
    L, d = cholesky_(C), C.shape[-1]
    parts = (
        (L[:, r:, r : r + WIDE], G[:, r:, r:]) for r in range(0, d, WIDE)
    )  # above its diagonal L is 0
    energy = torch.cat([((g @ l) * l).sum(-2) for l, g in parts], -1)
    return Basis(Pick(order, d), energy.clamp_min(0))
