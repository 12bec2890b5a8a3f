"""One axis of a parameter seen as the rows of a matrix, and readers that read from what stays."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...calibrate.tap import Reader
from ...core.change import Change


def lines(value: Tensor, dims: tuple[int, ...]) -> Tensor:
    """A parameter with the positions of one axis first: [positions, rest]."""
    rest = [d for d in range(value.dim()) if d not in dims]
    moved = value.permute(*dims, *rest)
    return moved.reshape(int(np.prod(moved.shape[: len(dims)])), -1)


@torch.no_grad()
def read_from_kept(p: Tensor, reader: Reader, at: np.ndarray, change: Change) -> None:
    """W ← W D on the coordinates that stay, and zero on the others, copy by copy."""
    dims = reader[1]
    rest = [d for d in range(p.dim()) if d not in dims]
    moved = p.permute(*dims, *rest)
    W = moved.reshape(int(np.prod(moved.shape[: len(dims)])), -1).clone()
    D, picks = change.decode.matrix(), change.encode.picks
    assert picks is not None
    for c, index in enumerate(torch.from_numpy(at)):
        new = D[c].mT @ W[index]
        W[index] = 0
        W[index[picks[c]]] = new
    back = np.argsort([*dims, *rest]).tolist()
    p.copy_(W.reshape(moved.shape).permute(*back))
