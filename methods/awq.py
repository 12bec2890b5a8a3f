"""Rounding `awq`: channels that carry much are scaled up before all weights are rounded to nearest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from invariance.method.rounding import Grid, Rounded, ScaledRounding, grid_bits


@dataclass(frozen=True)
class AWQ(ScaledRounding, name="awq"):
    """Rounding to nearest, with channels scaled so that those that carry much lose least.

    What reads one norm gets W diag(s), and the norm's gain is divided by s, which changes nothing before rounding. With
    s_j = E[x_j²]^(α/2), normalised, α is the one of ``steps`` + 1 values from 0 to 1 with the least
    E‖W x − Ŵ diag(s)⁻¹ x‖². Groups' scales are shrunk too, by the ``clips`` factor with the least weighted error
    Σ_j E[x_j²] (W_ij − Ŵ_ij)². Weights behind no norm are clipped alone. Only gains are stored besides, as before.

    Source: Lin et al. 2023, arXiv:2306.00978, sections 3.2 and 4; the mean square stands for the mean magnitude.
    """

    steps: int = 20
    clips: int = 10  # how many factors from 1 down to 0.5 are tried for a group's scale

    def __post_init__(self) -> None:
        if self.steps < 1 or self.clips < 1:
            raise ValueError("steps and clips must be at least 1")

    def channel_scales(
        self, weights: Sequence[Float[Tensor, "n m"]], C: Float[Tensor, "m m"], grid: Grid
    ) -> Float[Tensor, " m"]:
        W, C = torch.cat([w.double() for w in weights]), C.double()
        power = C.diagonal().clamp_min(torch.finfo(C.dtype).tiny)
        best, found = torch.inf, torch.ones_like(power)
        for step in range(self.steps + 1):
            s = power ** (step / self.steps / 2)
            s = (s / (s.amax() * s.amin()).sqrt()).clamp_min(1e-4)
            scaled = W * s
            error = grid.nearest(scaled, grid.scales(scaled)) / s - W
            loss = float(((error @ C) * error).sum())
            if loss < best:
                best, found = loss, s
        return found.to(weights[0].dtype)

    def round(self, W: Float[Tensor, "n m"], C: Float[Tensor, "m m"] | None, grid: Grid) -> Rounded:
        assert C is not None
        weight, whole = C.diagonal().to(W.dtype), grid.scales(W)
        best = torch.full_like(whole, torch.inf)
        scales = whole.clone()
        for n in range(self.clips):
            tried = (whole * (1 - 0.5 * n / self.clips)).bfloat16().to(W.dtype)
            error = (grid.nearest(W, tried) - W).square() * weight
            loss = error.unflatten(-1, (-1, grid.group)).sum(-1)
            scales = torch.where(loss < best, tried, scales)
            best = torch.minimum(loss, best)
        return Rounded(grid.nearest(W, scales), scales)

    def stored_bits(self, n: int, m: int, grid: Grid, plain: int) -> int:
        return grid_bits(n, m, grid)
