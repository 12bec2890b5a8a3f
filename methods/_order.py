"""What several rotators share: putting directions in order of falling energy."""

from __future__ import annotations

from jaxtyping import Float64
from torch import Tensor

from invariance.core.change import Basis
from invariance.core.operator import Operator


def by_energy(A: Operator, energy: Float64[Tensor, "c d"]) -> Basis:
    """The basis with its directions (columns) by falling energy; ties keep their order."""
    order = energy.argsort(dim=-1, descending=True, stable=True)
    return Basis(A.columns(order), energy.take_along_dim(order, -1))
