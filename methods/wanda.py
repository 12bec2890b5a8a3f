"""Rounding `wanda`: weights that meet little go, and nothing makes up for them."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from invariance.method.rounding import Grid, Rounded, Rounding

from ._mask import Pattern, check, largest, mask_bits


@dataclass(frozen=True)
class Wanda(Rounding, name="wanda"):
    """A mask: of each row, the weights with the largest |W_ij| E[x_j²]^½ stay, as they are.

    What is stored is a bit for every place and the numbers that stay; `bits` and `group` play no part. Dense hardware
    multiplies by the zeros too, so a mask by itself is no faster; pattern `2:4` is what some GPUs have units for.

    Source: Sun et al. 2023, arXiv:2306.11695.
    """

    keep: float = 0.5  # the share of the weights that stay
    pattern: Pattern = "free"  # or 2:4, two of four neighbours
    reads = True

    def __post_init__(self) -> None:
        check(self.keep, self.pattern)

    def round(self, W: Float[Tensor, "n m"], C: Float[Tensor, "m m"] | None, grid: Grid) -> Rounded:
        assert C is not None
        scores = W.abs() * C.diagonal().to(W.dtype).sqrt()
        return Rounded(W * largest(scores, self.keep, self.pattern, by_row=True))

    def stored_bits(self, n: int, m: int, grid: Grid, plain: int) -> int:
        return mask_bits(n, m, self.keep, self.pattern, plain)
