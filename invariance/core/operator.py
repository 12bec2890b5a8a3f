"""Operators on the coordinates of a space: what every form of a d × k matrix can do (pick.py, dense.py)."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from einops import repeat
from jaxtyping import Bool, Float64, Int, Shaped
from torch import Tensor

from .group import Group

RTOL = 1e-9  # how far an element may be from its group, relative to its largest entry


class Operator(ABC):
    """A matrix X of d × k for each copy of a space: a signal x of it becomes Xᵀx.

    It multiplies tensors from either side, copy by copy, and acts on any axis that holds coordinates (``contract``).
    The matrix itself is made by ``matrix`` alone, for small spaces: at d = 14336 it takes 1.6 GB.
    """

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """(copies, dim, width)."""

    @property
    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """All that is stored."""

    @property
    @abstractmethod
    def picks(self) -> Int[Tensor, "c k"] | None:
        """Which coordinate each column picks and scales; None where one mixes several."""

    @abstractmethod
    def matrix(self) -> Float64[Tensor, "c d k"]: ...

    @abstractmethod
    def contract(self, W: Shaped[Tensor, ...], axis: int = -1, runs: int = 1) -> Tensor:
        """W with the coordinates x on an axis as Xᵀx. The axis holds so many runs of d; neighbours share a copy."""

    @abstractmethod
    def back(self, W: Shaped[Tensor, ...], axis: int = -1, runs: int = 1) -> Tensor:
        """W with the coordinates z on an axis, in runs of k, as X z."""

    @abstractmethod
    def __matmul__(self, M: Float64[Tensor, "c k n"]) -> Float64[Tensor, "c d n"]: ...

    @abstractmethod
    def __rmatmul__(self, M: Float64[Tensor, "c n d"]) -> Float64[Tensor, "c n k"]: ...

    @abstractmethod
    def columns(self, kept: Int[Tensor, "*c k"]) -> Operator:
        """Some columns, in that order; of every copy the same, or each its own."""

    @abstractmethod
    def take(self, copies: Int[Tensor, " c"]) -> Operator:
        """Some copies, in that order."""

    @abstractmethod
    def scaled(self, by: Float64[Tensor, "c k"]) -> Operator:
        """Every column times a number."""

    @abstractmethod
    def grained(self, grain: int) -> Operator:
        """X ⊗ I: what X does to directions, on the numbers that stand for each, neighbours all."""

    @abstractmethod
    def pattern(self) -> Operator:
        """Ones where X has entries: what passes a gate, which scales and signs pass by."""

    @abstractmethod
    def dual(self) -> Operator:
        """X⁻ᵀ of a square X: what undoes it on the other side."""

    @abstractmethod
    def pairs(self, rotary: int) -> Int[Tensor, "c n"] | None:
        """Which frequency pair (j, j + rotary/2) each pair of columns (i, i + n) keeps, up to one complex scale.

        None where X is anything else: where columns mix pairs, split one, or mix them with the dims that rotary
        positions spare, which take the last columns. The number n of pairs kept is that of all copies.
        """

    @abstractmethod
    def within(self, group: Group, rotary: int = 0) -> bool:
        """Whether every copy is an element of the group, to ``RTOL`` of its largest entry."""

    @property
    def copies(self) -> int:
        return self.shape[0]

    @property
    def dim(self) -> int:
        return self.shape[1]

    @property
    def width(self) -> int:
        return self.shape[2]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)

    def same(self, other: Operator) -> bool:
        """Whether both store the same numbers."""
        if type(self) is not type(other) or self.shape != other.shape:
            return False
        ours, theirs = self.tensors, other.tensors
        return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


def support(X: Float64[Tensor, "*c d k"]) -> Bool[Tensor, "*c d k"]:
    """Where a matrix is not zero, to the rounding that ``Space.contains`` allows."""
    return X.abs() > RTOL * X.abs().amax() if X.numel() else X != 0


def spread(X: Tensor, runs: int) -> Tensor:
    """What belongs to each copy, for all runs that share it, neighbours; one run alone is the first copy's."""
    X = X[:runs]
    return repeat(X, "c ... -> (c r) ...", r=runs // len(X))


def whole(pairs: Tensor | None, rotary: int) -> bool:
    """Whether all frequency pairs are kept, where there are any."""
    return not rotary or (pairs is not None and pairs.shape[1] == rotary // 2)
