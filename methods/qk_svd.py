"""Rotator `qk_svd`: the singular directions of attention scores, where no positions turn queries and keys."""

from __future__ import annotations

from dataclasses import dataclass

from invariance.calibrate.moments import Moments
from invariance.calibrate.statistic import Statistic
from invariance.core.change import Basis
from invariance.core.group import Group
from invariance.core.linalg import svd
from invariance.core.space import Space
from invariance.method.interfaces import Rotator

from .head_svd import _root


@dataclass(frozen=True)
class QKSVD(Rotator, name="qk_svd"):
    """Directions of each KV head's queries and keys by what they add to the scores.

    With C_q and C_k the second moments of the queries (the query heads of a group stacked) and of the keys, and
    C_q^½ C_k^½ = U Σ Vᵀ, keeping k columns of A = C_k^-½ V Σ^½ keeps k of A⁻ᵀ = C_q^-½ U Σ^½, and minimises E|score −
    its cut|² over all maps of rank k, for independent queries and keys. New queries and keys both have the moment Σ.
    Energies are Σ². Biases count as in the signal. Exact while k = d.

    Source: Lin et al. 2024 (MoDeGPT), arXiv:2408.09632, section 3.2 (type II), with the whole invertible group in
    place of a choice of columns; the optimum is Eckart and Young's.
    """

    floor: float = (
        1e-9  # eigenvalues of C_q and C_k below this fraction of the largest are raised to it
    )
    produces = Group.INVERTIBLE
    kinds = frozenset({"qk"})
    needs = frozenset({Statistic.RAW, Statistic.QUERIES})

    def __post_init__(self) -> None:
        if not 0 < self.floor < 1:
            raise ValueError("floor must be between 0 and 1")

    def fit(self, space: Space, moments: Moments) -> Basis:
        query, _ = _root(moments.second(space, Statistic.QUERIES), self.floor)
        key, inverse = _root(moments.second(space), self.floor)
        _, sigma, Vt = svd(query @ key)
        return Basis(inverse @ Vt.mT * sigma.sqrt().unsqueeze(-2), sigma.square())
