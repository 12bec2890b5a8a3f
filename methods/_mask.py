"""What weights with a mask take: a bit for every place, and the numbers that are kept."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Pattern = Literal["free", "2:4"]


def check(keep: float, pattern: str) -> None:
    """Raises ValueError for a share that the pattern cannot have."""
    if not 0 < keep < 1:
        raise ValueError("keep must be above 0 and below 1")
    if pattern == "2:4" and keep != 0.5:
        raise ValueError("pattern 2:4 keeps half: keep must be 0.5")


def largest(
    scores: Float[Tensor, "n m"], keep: float, pattern: Pattern, by_row: bool
) -> Bool[Tensor, "n m"]:
    """Where scores are kept: the largest share of each row, or of all together, or two of four neighbours."""
    if pattern == "2:4":
        runs = scores.unflatten(-1, (-1, 4))
        kept = runs.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1, stable=True) < 2
        return kept.flatten(-2)
    rows = scores if by_row else scores.reshape(1, -1)
    count = max(round(keep * rows.shape[-1]), 1)
    places = rows.argsort(dim=-1, descending=True, stable=True)[:, :count]
    mask = torch.zeros_like(rows, dtype=torch.bool).scatter_(-1, places, True)
    return mask.reshape(scores.shape)


def mask_bits(n: int, m: int, keep: float, pattern: Pattern, plain: int) -> int:
    """Bits of the mask and of the kept numbers. Of four neighbours, which two stay takes four bits, two numbers of two."""
    return n * m + round(keep * n * m) * plain
