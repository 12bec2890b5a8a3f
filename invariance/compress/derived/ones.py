"""Bases of a stream under LayerNorm: orthogonal, and the vector of ones stays where it is."""

from __future__ import annotations

import torch
from jaxtyping import Float64
from torch import Tensor

from ...calibrate.moment import Moment
from ...core.change import Basis


def centred(moment: Moment) -> Moment:
    """Of the signal without its mean over all coordinates, which a LayerNorm takes away."""
    d = moment.total.shape[-1]
    P = torch.eye(d, dtype=torch.float64) - 1 / d
    return Moment(P @ moment.total @ P, moment.count)


def helmert(d: int) -> Float64[Tensor, "d n"]:
    """An orthonormal basis of what is orthogonal to the ones; column i lies on the first i + 2 coordinates."""
    H = torch.zeros(d, d - 1, dtype=torch.float64)
    for i in range(1, d):
        H[:i, i - 1] = 1 / (i * (i + 1)) ** 0.5
        H[i, i - 1] = -i / (i * (i + 1)) ** 0.5
    return H


def fixing_ones(basis: Basis) -> Basis:
    """A basis A of a centred signal as R = 11ᵀ/d + U Hᵀ, U the first d − 1 columns of A made orthogonal to the ones.

    R 1 = 1, and the first k coordinates hold the first k − 1 directions of U: what A says of a cut holds of R.
    """
    A = basis.A.matrix()[0]
    d = len(A)
    ones = torch.ones(d, 1, dtype=torch.float64) / d**0.5
    Q, r = torch.linalg.qr(torch.cat((ones, A[:, : d - 1]), 1))
    U = Q[:, 1:] * r.diagonal()[1:].sign()
    R = ones @ ones.T + U @ helmert(d).T
    energy = torch.cat((basis.energy[:, :1], basis.energy[:, : d - 1]), 1)
    return Basis(R[None], energy)
