"""Second moments of one space: of a signal, by its sum over tokens; of what readers weigh, computed when asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Float64
from torch import Tensor

from ..core.operator import Operator
from .outer import add_outer

ROWS = 512  # of a weight, which are squared together
Weights = Iterator[tuple[Float[Tensor, "o i"], Float64[Tensor, "o o"] | None]]


@dataclass
class Moment:
    """Σ w x xᵀ over the tokens seen, or Σ w x for a MEAN (float64, one a copy), and Σ w: how many, where all weigh 1."""

    total: Float64[Tensor, "c d *d"]
    count: float

    @property
    def mean(self) -> Float64[Tensor, "c d *d"]:
        return self.total / (self.count or 1.0)

    def blocks(self, grain: int) -> Float64[Tensor, "c n g g"]:
        """The blocks on the diagonal of ``mean``."""
        c, d, _ = self.total.shape
        apart = self.total.view(c, d // grain, grain, d // grain, grain)
        return apart.diagonal(dim1=1, dim2=3).movedim(-1, 1) / (self.count or 1.0)

    def times(self, X: Operator) -> Float64[Tensor, "c d k"]:
        """The mean times X, with no copy of it between."""
        return (self.total @ X).div_(self.count or 1.0)

    def __add__(self, other: Known) -> Moment:
        return Moment(self.total + other.total, self.count + other.count)


@dataclass(frozen=True)
class Gram:
    """Σ Wᵀ M W over weights W that read a space, M the identity where it is None; it stands where a ``Moment`` does.

    The inputs of W lie in runs of ``width`` numbers. Runs that share a copy count as one of them does on average, since
    moments of the signal add up over them. ``count`` is the number of spaces that are pooled.
    """

    copies: int
    width: int
    weights: Callable[[], Weights]
    count: float = 1

    @property
    def total(self) -> Float64[Tensor, "c d d"]:
        total: Tensor | None = None
        for W, M in self.weights():
            part = self._whole(W.double(), M)
            total = part if total is None else total.add_(part)
            del W, M, part
        return self._empty(self.width, self.width) if total is None else total

    @property
    def mean(self) -> Float64[Tensor, "c d d"]:
        return self.total.div_(self.count)

    def blocks(self, grain: int) -> Float64[Tensor, "c n g g"]:
        """The blocks on the diagonal of ``mean``; d² numbers are never held."""
        total = self._empty(self.width // grain, grain, grain)
        for W, M in self.weights():
            runs = W.shape[1] // (self.copies * self.width)
            for rows in torch.arange(len(W)).split(ROWS):
                X = W[rows].double()
                Y = X if M is None else M[rows] @ W.double()
                X, Y = (
                    rearrange(x, "o (c r n g) -> o c r n g", c=self.copies, r=runs, g=grain)
                    for x in (X, Y)
                )
                if grain == 1:
                    total += (X * Y).sum((0, 2)).unsqueeze(-1) / runs
                else:
                    total += einsum(X, Y, "o c r n g, o c r n h -> c n g h") / runs
        return total.div_(self.count)

    def __add__(self, other: Known) -> Known:
        """That of the spaces of both."""
        if isinstance(other, Moment):
            return other + self
        return Gram(
            self.copies,
            self.width,
            lambda: chain(self.weights(), other.weights()),
            self.count + other.count,
        )

    def _empty(self, *shape: int) -> Tensor:
        return torch.zeros(self.copies, *shape, dtype=torch.float64)

    def _whole(self, W: Float64[Tensor, "o i"], M: Tensor | None) -> Float64[Tensor, "c d d"]:
        runs = W.shape[1] // (self.copies * self.width)
        if M is None:
            X = rearrange(W, "n (c r d) -> c (n r) d", c=self.copies, d=self.width)
            total = self._empty(self.width, self.width)
            add_outer(X, total)
            return total.div_(runs)
        W = rearrange(W, "o (c r d) -> c r o d", c=self.copies, d=self.width)
        return einsum(W, M @ W, "c r o d, c r o e -> c d e").div_(runs)


Known = Moment | Gram
