"""The interface of a rounding: a weight in, the numbers that a checkpoint stores for it out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from .interfaces import Method

SCALE = torch.bfloat16  # of a scale: 16 bits, the exponents of float32


@dataclass(frozen=True)
class Grid:
    """Which numbers a weight may become: whole multiples of a scale, −2ᵇ⁻¹ to 2ᵇ⁻¹ − 1, a scale for each group."""

    bits: int
    group: int  # neighbours in a row that share a scale

    def scales(self, W: Float[Tensor, "n m"]) -> Float[Tensor, "n g"]:
        """The least scale of each group at which all of its weights lie on the grid's range, rounded to 16 bits."""
        runs, top = W.float().unflatten(-1, (-1, self.group)), 2 ** (self.bits - 1)
        least = torch.maximum(runs.amax(-1) / (top - 1), runs.amin(-1) / -top)
        return least.clamp_min(torch.finfo(SCALE).tiny).to(SCALE).to(W.dtype)

    def nearest(
        self, W: Float[Tensor, "n m"], scales: Float[Tensor, "n g"]
    ) -> Float[Tensor, "n m"]:
        """The nearest numbers of the grid."""
        s, top = scales.repeat_interleave(W.shape[-1] // scales.shape[-1], -1), 2 ** (self.bits - 1)
        return (W / s).round().clamp(-top, top - 1) * s


@dataclass(frozen=True, eq=False)
class Rounded:
    """The numbers that a weight has become; where they lie on a grid, the scales that are stored with its integers."""

    values: Float[Tensor, "n m"]
    scales: Float[Tensor, "n g"] | None = None  # None: nothing but a mask, kept numbers as they are


class Rounding(Method, ABC):
    """How the weights of linear layers are stored in fewer bits."""

    kind = "round"
    reads: ClassVar[bool] = False  # whether it reads the second moment of what the layer reads

    @abstractmethod
    def round(self, W: Float[Tensor, "n m"], C: Float[Tensor, "m m"] | None, grid: Grid) -> Rounded:
        """The weight rounded; C = E[x xᵀ] of what it multiplies, y = W x, where the rounding ``reads`` it."""

    @abstractmethod
    def stored_bits(self, n: int, m: int, grid: Grid, plain: int) -> int:
        """How many bits an n × m weight takes; ``plain`` are those of a number that is not rounded."""


class ScaledRounding(Rounding):
    """A rounding that first scales the channels which several weights read behind one norm; the norm takes it back."""

    reads = True

    @abstractmethod
    def channel_scales(
        self, weights: Sequence[Float[Tensor, "n m"]], C: Float[Tensor, "m m"], grid: Grid
    ) -> Float[Tensor, " m"]:
        """What the columns of all the weights are multiplied by, and the norm's gain is divided by."""


def grid_bits(n: int, m: int, grid: Grid) -> int:
    """Bits of integers and scales, packed tightly."""
    return n * m * grid.bits + n * m // grid.group * 8 * SCALE.itemsize
