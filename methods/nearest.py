"""Rounding `nearest`: every weight becomes the nearest number of its group's grid."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from invariance.method.rounding import Grid, Rounded, Rounding, grid_bits


@dataclass(frozen=True)
class Nearest(Rounding, name="nearest"):
    """Every weight becomes the nearest multiple of its group's scale; nothing makes up for errors.

    The scale is the least at which all weights of the group lie between −2ᵇ⁻¹ s and (2ᵇ⁻¹ − 1) s, so that no weight
    moves by more than s/2. No data are read.

    Source: the baseline of Frantar et al. 2022, arXiv:2210.17323 ("RTN").
    """

    def round(self, W: Float[Tensor, "n m"], C: Float[Tensor, "m m"] | None, grid: Grid) -> Rounded:
        scales = grid.scales(W)
        return Rounded(grid.nearest(W, scales), scales)

    def stored_bits(self, n: int, m: int, grid: Grid, plain: int) -> int:
        return grid_bits(n, m, grid)
