"""Decompositions that do not give up, and inverses that take no memory of their own."""

from __future__ import annotations

import numpy as np
import scipy.linalg
import torch
from jaxtyping import Float64, Int
from torch import Tensor

ROWS = 512  # which are moved together


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


def inverse_(M: Float64[Tensor, "c d d"]) -> Float64[Tensor, "c d d"]:
    """The inverses of symmetric positive definite matrices, in their place. Raises LinAlgError for any other."""
    for m in M:
        L = _factor(m)
        _, info = scipy.linalg.lapack.dpotri(L, lower=True, overwrite_c=True)
        _checked(info)
        _mirror(m)
    return M


def cholesky_(M: Float64[Tensor, "c d d"]) -> Float64[Tensor, "c d d"]:
    """The lower factors L of symmetric positive definite matrices L Lᵀ, in their place. Raises LinAlgError as above."""
    for m in M:
        _factor(m)
        for r in range(0, len(m), ROWS):  # LAPACK has it in the upper triangle, by rows
            rows = slice(r, r + ROWS)
            m[r + ROWS :, rows] = m[rows, r + ROWS :].mT
            m[rows, r + ROWS :] = 0
            m[rows, rows] = m[rows, rows].triu().mT.clone()
    return M


def solve_(S: Float64[Tensor, "c k k"], B: Float64[Tensor, "c n k"]) -> Float64[Tensor, "c n k"]:
    """B S⁻¹ of symmetric positive definite S, in the place of B; S is used up. Raises LinAlgError for any other S."""
    for s, b in zip(S, B, strict=True):
        x, info = scipy.linalg.lapack.dpotrs(_factor(s), b.numpy().T, lower=True, overwrite_b=True)
        _checked(info)
        b.copy_(
            torch.from_numpy(x.T)
        )  # where it lies already, if b's rows lie one behind the other
    return B


def reorder_(M: Float64[Tensor, "d d"], order: Int[Tensor, " d"]) -> Float64[Tensor, "d d"]:
    """Rows and columns of a matrix in an order, in its place."""
    ahead = order.tolist()
    for start in range(len(ahead)):  # cycle by cycle; what is in place already names itself
        if ahead[start] == start:
            continue
        first, i = M[start].clone(), start
        while (j := ahead[i]) != start:
            M[i] = M[j]
            ahead[i], i = i, j
        M[i], ahead[i] = first, i
    for rows in M.split(ROWS):
        rows.copy_(rows[:, order])
    return M


def part_(M: Float64[Tensor, "d d"], kept: Int[Tensor, " k"]) -> Float64[Tensor, "k k"]:
    """Some rows and columns of a matrix, whose numbers ascend, in the memory where it begins; the rest is used up."""
    k = len(kept)
    part = M.view(-1)[: k * k].view(k, k)
    for rows in torch.arange(k).split(
        ROWS
    ):  # row i of the part ends before row kept[i + 1] of M begins
        part[rows] = M[kept[rows][:, None], kept]
    return part


def _factor(m: Float64[Tensor, "d d"]) -> np.ndarray:
    """The lower Cholesky factor of a symmetric matrix, as LAPACK sees it: columns one behind the other, in m's place."""
    L, info = scipy.linalg.lapack.dpotrf(m.numpy().T, lower=True, overwrite_a=True, clean=False)
    _checked(info)
    assert L.base is not None and np.shares_memory(L, m.numpy())
    return L


def _checked(info: int) -> None:
    if info:
        raise torch.linalg.LinAlgError(f"a matrix is not positive definite (LAPACK: {info})")


def _mirror(m: Float64[Tensor, "d d"]) -> None:
    """The upper triangle below the diagonal too."""
    for r in range(0, len(m), ROWS):
        rows = slice(r, r + ROWS)
        m[r + ROWS :, rows] = m[rows, r + ROWS :].mT
        square = m[rows, rows]
        square.copy_(square.triu() + square.triu(1).mT)
