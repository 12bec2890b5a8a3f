"""Columns of a weight decided one by one, those behind made up for each error: what GPTQ and SparseGPT share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Float64
from torch import Tensor

Column = Callable[[int, Float64[Tensor, " n"]], Float64[Tensor, " n"]]  # (place, wanted) → decided
Begin = Callable[[Float64[Tensor, "n b"], Float64[Tensor, " b"]], Column]


def sweep(
    W: Float[Tensor, "n m"], C: Float[Tensor, "m m"], ridge: float, width: int, begin: Begin
) -> Float64[Tensor, "n m"]:
    """The decided weight. ``begin`` sees each run of ``width`` columns as they are when their turn comes, with the
    diagonal of U, and says how each is decided.

    With H = C + λI and H⁻¹ = UᵀU, U upper triangular, an error e of column j is least harmful in E‖W x − Ŵ x‖² if the
    columns behind become W_k − e U_jk / U_jj: so they minimise it, those in front being fixed.
    """
    W, H = W.double().clone(), C.double().clone()
    dead = H.diagonal() == 0
    H[dead, dead] = 1.0  # nothing ever comes in there, so anything goes
    H.diagonal().add_(ridge * H.diagonal().mean())
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    for i in range(0, W.shape[1], width):
        here = slice(i, i + width)
        block, V = W[:, here].clone(), U[here, here]
        decide, errors = begin(block.clone(), V.diagonal()), torch.zeros_like(block)
        for j in range(block.shape[1]):
            decided = decide(j, block[:, j])
            errors[:, j] = (block[:, j] - decided) / V[j, j]
            block[:, j + 1 :] -= errors[:, j, None] * V[j, j + 1 :]
            W[:, i + j] = decided
        W[:, i + width :] -= errors @ U[here, i + width :]
    return W
