"""Rounding `gptq`: column by column, those behind make up for each error."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from invariance.method.rounding import Grid, Rounded, Rounding, grid_bits

from ._feedback import Column, sweep


@dataclass(frozen=True)
class GPTQ(Rounding, name="gptq"):
    """Columns are rounded one by one; the columns behind change so that E‖W x − Ŵ x‖² stays least.

    With H = C + λI, λ = ridge × its mean diagonal entry, and F the columns that are rounded, the others become
    W_R − (Ŵ_F − W_F) H_FR H_RR⁻¹. A group's scale is that of its weights when their turn comes. What is stored is what
    `nearest` stores. Behind a Hadamard basis this is QuIP's LDLQ with incoherent weights (its theorem 6: the two
    roundings are the same), see `recipes/quip-int4.yaml`.

    Source: Frantar et al. 2022, arXiv:2210.17323; Chee et al. 2023 (QuIP), arXiv:2307.13304.
    """

    ridge: float = 0.01  # added to C, as a fraction of its mean diagonal entry
    reads = True

    def __post_init__(self) -> None:
        if not self.ridge > 0:
            raise ValueError("ridge must be above 0")

    def round(self, W: Float[Tensor, "n m"], C: Float[Tensor, "m m"] | None, grid: Grid) -> Rounded:
        assert C is not None
        scales: list[Tensor] = []

        def begin(block: Float64[Tensor, "n b"], _: Float64[Tensor, " b"]) -> Column:
            scales.append(grid.scales(block))
            return lambda j, w: grid.nearest(w[:, None], scales[-1])[:, 0]

        values = sweep(W, C, self.ridge, grid.group, begin)
        return Rounded(values.to(W.dtype), torch.cat(scales, 1).to(W.dtype))

    def stored_bits(self, n: int, m: int, grid: Grid, plain: int) -> int:
        return grid_bits(n, m, grid)
