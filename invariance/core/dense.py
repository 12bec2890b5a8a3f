"""Dense operators, by their entries, and any matrix as the operator that it is."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from einops import einsum, rearrange
from jaxtyping import Float64, Int
from torch import Tensor

from .group import Group
from .operator import RTOL, Operator, spread, support, whole
from .pick import Pick


@dataclass(frozen=True, eq=False)
class Dense(Operator):
    """Any matrix, by its entries."""

    X: Float64[Tensor, "c d k"]

    @property
    def shape(self) -> tuple[int, int, int]:
        c, d, k = self.X.shape
        return c, d, k

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.X,)

    @property
    def picks(self) -> Int[Tensor, "c k"] | None:
        return None if self._pick is None else self._pick.index

    @cached_property
    def _pick(self) -> Pick | None:
        return _picked(self.X)

    def matrix(self) -> Float64[Tensor, "c d k"]:
        return self.X

    def contract(self, W: Tensor, axis: int = -1, runs: int = 1) -> Tensor:
        X = self.X.to(W)
        if runs == 1:
            return torch.tensordot(W, X[0], ([axis], [0])).movedim(-1, axis)
        W = rearrange(W.movedim(axis, -1), "... (h d) -> ... h d", h=runs)
        out = einsum(W, spread(X, runs), "... h d, h d k -> ... h k")
        return rearrange(out, "... h k -> ... (h k)").movedim(-1, axis)

    def back(self, W: Tensor, axis: int = -1, runs: int = 1) -> Tensor:
        return Dense(self.X.mT).contract(W, axis, runs)

    def __matmul__(self, M: Tensor) -> Tensor:
        return self.X @ M

    def __rmatmul__(self, M: Tensor) -> Tensor:
        return M @ self.X

    def columns(self, kept: Tensor) -> Operator:
        kept = kept.to(self.X.device)
        if kept.ndim == 1:
            return as_operator(self.X[..., kept].contiguous())
        return as_operator(self.X.take_along_dim(kept.unsqueeze(-2), -1))

    def take(self, copies: Tensor) -> Operator:
        return as_operator(self.X[copies])

    def scaled(self, by: Tensor) -> Dense:
        return Dense(self.X * by.unsqueeze(-2))

    def grained(self, grain: int) -> Dense:
        if grain == 1:
            return self
        eye = torch.eye(grain, dtype=self.X.dtype, device=self.X.device)
        return Dense(torch.kron(self.X.contiguous(), eye))

    def pattern(self) -> Dense:
        return Dense(support(self.X).to(self.X.dtype))

    def dual(self) -> Dense:
        return Dense(torch.linalg.inv(self.X).mT.contiguous())

    def pairs(self, rotary: int) -> Tensor | None:
        X = self.X
        if not X.numel():
            return None
        tol = RTOL * X.abs().amax()
        h, turned = rotary // 2, (X[:, :rotary].abs() > tol).any(1)
        n = int(turned[0].sum()) // 2
        leading = (torch.arange(self.width, device=X.device) < 2 * n).expand_as(turned)
        leaks = bool((X[:, rotary:, : 2 * n].abs() > tol).any())
        if not n or leaks or not torch.equal(turned, leading):
            return None
        left, right = X[:, :rotary, :n], X[:, :rotary, n : 2 * n]
        a, b, c, d = left[:, :h], left[:, h:], right[:, :h], right[:, h:]
        size = a.abs() + b.abs()
        complex_scale = torch.maximum((a - d).abs(), (b + c).abs()).amax() <= tol
        one_each = bool(((size > tol).sum(1) == 1).all())
        return size.argmax(1) if complex_scale and one_each else None

    def within(self, group: Group, rotary: int = 0) -> bool:
        A = self.X.double()
        if self.dim != self.width or not bool(torch.isfinite(A).all() and A.abs().amax() > 0):
            return False
        if self._pick is not None:
            return self._pick.within(group, rotary)
        if group is Group.ORTHOGONAL:
            eye = torch.eye(self.dim, dtype=A.dtype, device=A.device)
            return bool((A.mT @ A - eye).abs().amax() <= RTOL * self.dim)
        if group is Group.ROTARY and not whole(self.pairs(rotary), rotary):
            return False
        wide = group in (Group.ROTARY, Group.INVERTIBLE)
        return wide and bool((torch.linalg.cond(A) < 1e12).all())


def as_operator(X: Operator | Float64[Tensor, "c d k"]) -> Operator:
    """A matrix as what it does: a Pick where every column of it has one entry."""
    if isinstance(X, Operator):
        return X
    return _picked(X) or Dense(X)


def compose(A: Operator, B: Operator) -> Operator:
    """A times B: first A changes the coordinates, then B."""
    if isinstance(A, Pick) and isinstance(B, Pick):
        return A.then(B)
    return as_operator(A.matrix() @ B if isinstance(B, Pick) else A @ B.matrix())


def pairs_kept(X: Operator | Tensor, rotary: int) -> Int[Tensor, "c n"] | None:
    """``Operator.pairs``."""
    return as_operator(X).pairs(rotary)


def in_group(group: Group, A: Operator | Float64[Tensor, "c d d"], rotary: int = 0) -> bool:
    """``Operator.within``."""
    return as_operator(A).within(group, rotary)


def _picked(X: Float64[Tensor, "c d k"]) -> Pick | None:
    if X.is_meta or bool((support(X[:1, :, :1]).sum(1) > 1).any()):  # most others are told by that
        return None
    found = support(X)
    if not bool((found.sum(1) == 1).all()):
        return None
    index = found.int().argmax(1)
    scale = X.gather(1, index.unsqueeze(1)).squeeze(1).double().cpu()
    return Pick(index.cpu(), X.shape[1], None if bool((scale == 1).all()) else scale)
