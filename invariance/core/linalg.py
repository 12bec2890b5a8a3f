"""Decompositions that do not give up."""

from __future__ import annotations

import numpy as np
import scipy.linalg
import torch
from jaxtyping import Float64
from torch import Tensor


def svd(M: Float64[Tensor, "*c m n"]) -> tuple[Tensor, Tensor, Tensor]:
    """U (…, m, k), σ (…, k) and Vᵀ (…, k, n) of M = U Σ Vᵀ, with k = min(m, n).

    Divide and conquer (LAPACK's gesdd), the fast way, now and then does not converge where singular values repeat, as
    the cosines between two bases do that share most directions; QR iterations (gesvd) then do. Raises ValueError for
    numbers that are not finite.
    """
    try:
        return torch.linalg.svd(M, full_matrices=False)
    except torch.linalg.LinAlgError:
        each = [
            scipy.linalg.svd(m.numpy(force=True), full_matrices=False, lapack_driver="gesvd")
            for m in M.reshape(-1, *M.shape[-2:])
        ]
        U, sigma, Vt = (
            torch.from_numpy(np.stack(part)).to(M.device) for part in zip(*each, strict=True)
        )
        batch = M.shape[:-2]
        return U.view(*batch, *U.shape[1:]), sigma.view(*batch, -1), Vt.view(*batch, *Vt.shape[1:])
