"""What several rotators share: putting directions in order of falling energy."""

from __future__ import annotations

import torch
from jaxtyping import Float64
from torch import Tensor

from invariance.core.space import Basis


def by_energy(A: Float64[Tensor, "c d d"], energy: Float64[Tensor, "c d"]) -> Basis:
    """The basis with its directions (columns) by falling energy; ties keep their order."""
    order = energy.argsort(dim=-1, descending=True, stable=True)
    return Basis(A.take_along_dim(order.unsqueeze(-2), -1), energy.take_along_dim(order, -1))


def captured(A: Float64[Tensor, "c d d"], C: Float64[Tensor, "c d d"]) -> Float64[Tensor, "c d"]:
    """The energy aᵀ C a along every column a."""
    return torch.einsum("cij,cik,ckj->cj", A, C, A)
