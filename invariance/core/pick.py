"""Picks: permutations, choices of channels, scales and signs, stored as an index and a number a column."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from .group import Group
from .operator import RTOL, Operator, spread, whole


@dataclass(frozen=True, eq=False)
class Pick(Operator):
    """Column j picks coordinate index[j], times scale[j] where there are scales: permutations, and choices of channels.

    Index and scale lie on the CPU.
    """

    index: Int[Tensor, "c k"]
    d: int
    scale: Float64[Tensor, "c k"] | None = None

    @classmethod
    def first(cls, copies: int, d: int, k: int | None = None) -> Pick:
        """The first k coordinates, as they are; by default all: the identity."""
        return cls.of(torch.arange(d if k is None else k, device="cpu"), copies, d)

    @classmethod
    def of(cls, kept: Int[Tensor, " k"], copies: int, d: int) -> Pick:
        """The same coordinates of every copy."""
        return cls(kept.cpu().expand(copies, -1), d)

    @property
    def shape(self) -> tuple[int, int, int]:
        return (len(self.index), self.d, self.index.shape[1])

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.index,) if self.scale is None else (self.index, self.scale)

    @property
    def picks(self) -> Int[Tensor, "c k"]:
        return self.index

    @property
    def entries(self) -> Float64[Tensor, "c k"]:
        if self.scale is not None:
            return self.scale
        return torch.ones(self.index.shape, dtype=torch.float64, device="cpu")

    def matrix(self) -> Float64[Tensor, "c d k"]:
        X = torch.zeros(self.shape, dtype=torch.float64, device="cpu")
        return X.scatter_(1, self.index.unsqueeze(1), self.entries.unsqueeze(1))

    def contract(self, W: Tensor, axis: int = -1, runs: int = 1) -> Tensor:
        index, scale = self._along(W, axis, runs)
        out = W.index_select(axis, index)
        return out if scale is None else out * scale

    def back(self, W: Tensor, axis: int = -1, runs: int = 1) -> Tensor:
        index, scale = self._along(W, axis, runs)
        shape = list(W.shape)
        shape[axis] = runs * self.d
        return W.new_zeros(shape).index_add(axis, index, W if scale is None else W * scale)

    def _along(self, W: Tensor, axis: int, runs: int) -> tuple[Tensor, Tensor | None]:
        """The places on an axis of several runs, and the scales in W's shape and dtype."""
        index = spread(self.index, runs) + torch.arange(runs, device="cpu")[:, None] * self.d
        if self.scale is None:
            return index.flatten().to(W.device), None
        shape = [1] * W.ndim
        shape[axis] = -1
        return index.flatten().to(W.device), spread(self.scale, runs).reshape(shape).to(W)

    def __matmul__(self, M: Tensor) -> Tensor:
        M = M if self.scale is None else M * self.scale.unsqueeze(-1)
        out = M.new_zeros(len(M), self.d, M.shape[-1])
        return out.scatter_add(1, self.index.unsqueeze(-1).expand_as(M), M)

    def __rmatmul__(self, M: Tensor) -> Tensor:
        picked = M.gather(-1, self.index.unsqueeze(1).expand(-1, M.shape[-2], -1))
        return picked if self.scale is None else picked * self.scale.unsqueeze(1)

    def then(self, other: Pick) -> Pick:
        """This one times another."""
        plain = self.scale is None and other.scale is None
        scale = None if plain else self.entries.gather(1, other.index) * other.entries
        return Pick(self.index.gather(1, other.index), self.d, scale)

    def columns(self, kept: Tensor) -> Pick:
        kept = kept.to(self.index.device).expand(self.copies, -1)
        scale = None if self.scale is None else self.scale.gather(1, kept)
        return Pick(self.index.gather(1, kept), self.d, scale)

    def take(self, copies: Tensor) -> Pick:
        return Pick(self.index[copies], self.d, None if self.scale is None else self.scale[copies])

    def scaled(self, by: Tensor) -> Pick:
        return Pick(self.index, self.d, self.entries * by)

    def grained(self, grain: int) -> Pick:
        if grain == 1:
            return self
        index = self.index.unsqueeze(-1) * grain + torch.arange(grain, device="cpu")
        scale = None if self.scale is None else self.scale.repeat_interleave(grain, 1)
        return Pick(index.flatten(1), self.d * grain, scale)

    def pattern(self) -> Pick:
        return Pick(self.index, self.d)

    def dual(self) -> Pick:
        return Pick(self.index, self.d, None if self.scale is None else 1 / self.scale)

    def pairs(self, rotary: int) -> Tensor | None:
        turned = self.index < rotary
        n = int(turned[:1].sum()) // 2
        leading = (torch.arange(self.width, device="cpu") < 2 * n).expand_as(turned)
        if not n or not torch.equal(turned, leading):
            return None
        left, right = self.index[:, :n], self.index[:, n : 2 * n]
        a, b = self.entries[:, :n], self.entries[:, n : 2 * n]
        ahead = left < rotary // 2  # a column that picks the second dim of a pair turns it by 90°
        partner = torch.where(ahead, left + rotary // 2, left - rotary // 2)
        tol = RTOL * self.entries.abs().amax()
        one_scale = (torch.where(ahead, a - b, a + b).abs() <= tol) & (a.abs() > tol)
        partners = torch.equal(right, partner) and bool(one_scale.all())
        return left % (rotary // 2) if partners else None

    def within(self, group: Group, rotary: int = 0) -> bool:
        if self.d != self.width:
            return False
        one_each = torch.equal(self.index.sort()[0], Pick.first(*self.shape[:2]).index)
        size = self.entries.abs()
        if not one_each or not bool(torch.isfinite(size).all() and (size > 0).all()):
            return False
        tol = RTOL * size.amax()
        ones = bool((self.entries - 1).abs().amax() <= tol)
        if group is Group.IDENTITY:
            return ones and self.pattern().same(Pick.first(*self.shape[:2]))
        if group is Group.PERMUTATION:
            return ones
        if group is Group.SIGNED_PERMUTATION:
            return bool((size - 1).abs().amax() <= tol)
        if group is Group.ORTHOGONAL:
            return bool((size.square() - 1).abs().amax() <= RTOL * self.d)
        if group is Group.POSITIVE_MONOMIAL:
            return bool((self.entries > 0).all())
        invertible = bool((size.amax(1) < 1e12 * size.amin(1)).all())
        if group is Group.ROTARY:
            return whole(self.pairs(rotary), rotary) and invertible
        return group is Group.MONOMIAL or invertible
