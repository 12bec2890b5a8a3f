"""Rotator `fisher_svd`: the singular directions of one matrix, whitened by its inputs and by the output's Fisher."""

from __future__ import annotations

from dataclasses import dataclass

from invariance.calibrate.moments import Moments
from invariance.calibrate.statistic import Statistic
from invariance.core.change import Basis
from invariance.core.group import Group
from invariance.core.space import Space
from invariance.method.interfaces import NATS, Rotator

from .head_svd import whitened


@dataclass(frozen=True)
class FisherSVD(Rotator, name="fisher_svd"):
    """Directions inside one matrix by the nats that the output loses with them.

    W = W₂ W₁ is split in two, y = W₁ x lies between them, C = E[y yᵀ]; F is the output-KL Fisher where W writes to the
    stream, and G = ½ W₂ᵀ F W₂. Keeping k columns of A = C^-½ V, where G^½ C^½ = U Σ Vᵀ, minimises
    ½ tr F (W − W') E[x xᵀ] (W − W')ᵀ over all W' of rank k, as the SVD of F^½ W E[x xᵀ]^½ does. Energies Σ² are nats a token,
    if errors and gradients are independent. Made for matrices that write to the stream: `spaces: [edge.*.out, edge.*.down]`.

    Source: OBD-LLM, arXiv:2604.00821, the Fisher on both sides of a factor, with that of the output's labels.
    """

    floor: float = 1e-9  # eigenvalues of C below this fraction of the largest are raised to it
    produces = Group.INVERTIBLE
    kinds = frozenset({"edge"})
    needs = frozenset({Statistic.RAW, Statistic.FISHER})
    unit = NATS

    def __post_init__(self) -> None:
        if not 0 < self.floor < 1:
            raise ValueError("floor must be between 0 and 1")

    def fit(self, space: Space, moments: Moments) -> Basis:
        half = moments.second(space, Statistic.FISHER) / 2
        return whitened(moments.second(space), half, self.floor)
