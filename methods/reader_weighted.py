"""Rotator `reader_weighted`: the directions of the stream that its readers' outputs need most."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from invariance.calibrate.moments import Moments
from invariance.calibrate.statistic import Statistic
from invariance.core.change import Basis
from invariance.core.group import Group
from invariance.core.space import Space
from invariance.method.interfaces import Rotator

from ._channels import damped_


@dataclass(frozen=True)
class ReaderWeighted(Rotator, name="reader_weighted"):
    """Nested spans of what the readers need of the signal n: reduced-rank regression of W n, made orthogonal.

    With C = E[n nᵀ], G = Σ WᵀW and G^½ C G^½ = U Λ Uᵀ, the k numbers of n from which W n is best predicted are
    U_kᵀ G^½ n, and the loss is the sum of the other λ. The norm admits orthogonal bases only, so the columns are those
    of Q in G^½ U = Q R: their first k span the same. That loss, so Λ as energies, needs `slice: least_squares`.

    Source: Izenman 1975 (reduced-rank regression); the metric is that of MoDeGPT's type III, arXiv:2408.09632.
    """

    damping: float = 1e-3  # added to G, as a fraction of its mean diagonal entry
    produces = Group.ORTHOGONAL
    kinds = frozenset({"residual"})
    needs = frozenset({Statistic.SEEN, Statistic.READERS})

    def __post_init__(self) -> None:
        if not self.damping > 0:
            raise ValueError("damping must be above 0")

    def fit(self, space: Space, moments: Moments) -> Basis:
        G = damped_(moments.second(space, Statistic.READERS), self.damping)
        values, V = torch.linalg.eigh(G)
        half = (V * values.clamp_min(0).sqrt().unsqueeze(-2)) @ V.mT
        energy, U = torch.linalg.eigh(half @ moments.second(space, Statistic.SEEN) @ half)
        Q, _ = torch.linalg.qr(half @ U.flip(-1))
        return Basis(Q, energy.flip(-1).clamp_min(0))
