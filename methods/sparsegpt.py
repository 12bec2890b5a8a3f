"""Rounding `sparsegpt`: weights that cost least go, and those behind make up for them."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Float64
from torch import Tensor

from invariance.method.rounding import Grid, Rounded, Rounding

from ._feedback import Column, sweep
from ._mask import Pattern, check, largest, mask_bits


@dataclass(frozen=True)
class SparseGPT(Rounding, name="sparsegpt"):
    """A mask, chosen in runs of columns by W_ij² / U_jj², H⁻¹ = UᵀU, H = C + λI; columns behind make up for what goes.

    The score is what is lost when a weight goes and those behind it are refit. What is stored is a bit for every place and
    the numbers that stay; `bits` and `group` play no part. Dense hardware multiplies by the zeros too, so a mask by
    itself is no faster; pattern `2:4` is what some GPUs have units for.

    Source: Frantar and Alistarh 2023, arXiv:2301.00774.
    """

    keep: float = 0.5  # the share of the weights that stay
    pattern: Pattern = "free"  # or 2:4, two of four neighbours
    ridge: float = 0.01  # added to C, as a fraction of its mean diagonal entry
    block: int = 128  # columns whose mask is chosen at once, a multiple of 4
    reads = True

    def __post_init__(self) -> None:
        check(self.keep, self.pattern)
        if not self.ridge > 0:
            raise ValueError("ridge must be above 0")
        if self.block < 4 or self.block % 4:
            raise ValueError("block must be a multiple of 4")

    def round(self, W: Float[Tensor, "n m"], C: Float[Tensor, "m m"] | None, grid: Grid) -> Rounded:
        assert C is not None

        def begin(block: Float64[Tensor, "n b"], d: Float64[Tensor, " b"]) -> Column:
            mask = largest((block / d).square(), self.keep, self.pattern, by_row=False)
            return lambda j, w: w * mask[:, j]

        return Rounded(sweep(W, C, self.ridge, self.block, begin).to(W.dtype))

    def stored_bits(self, n: int, m: int, grid: Grid, plain: int) -> int:
        return mask_bits(n, m, self.keep, self.pattern, plain)
