"""Bases and changes of basis: what is done to everything that writes a space, and to everything that reads it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from .dense import as_operator
from .operator import Operator, spread
from .pick import Pick
from .space import Space


@dataclass(frozen=True, init=False)
class Basis:
    """An exact change of basis: new coordinates are Aᵀx; ``energy`` is what is lost if a direction goes.

    A is given as an operator or as a matrix of shape (copies, dim, dim). Slicers keep from the left, the columns
    ``Space.kept(k)``: what cutting to k loses is the sum of the energies from k on. They fall, unless the rotator is
    ``nested``, and stand in the order in which directions are kept: where rotary positions turn pairs (i, i + half),
    what they spare, then pair after pair, each of its two dims with half of it.
    """

    A: Operator
    energy: Float64[Tensor, "c d"]

    def __init__(
        self, A: Operator | Float64[Tensor, "c d d"], energy: Float64[Tensor, "c d"]
    ) -> None:
        object.__setattr__(self, "A", as_operator(A))
        object.__setattr__(self, "energy", energy)

    @property
    def nbytes(self) -> int:
        return self.A.nbytes + self.energy.nbytes


@dataclass(frozen=True, eq=False, init=False)
class Change:
    """A change on a space: ``encode`` acts on everything that writes it, ``decode`` on everything that reads it.

    Both are given as operators or as matrices. A signal x becomes Eᵀx, and is read back as D Eᵀ x + offset, if there is
    one. With k = d, E = A and D = A⁻ᵀ it is a rotation: exact when A is in the group. With k < d, E Dᵀ is a projector: a
    slice. On a space with a grain g, ``decode`` may also act on all numbers that readers see, (c, d·g, k·g): directions
    that stay then make up for those that go. ``offset`` always speaks of what readers see, in the coordinates of x; it
    goes into the readers' biases. ``entry`` is F where a low-rank shortcut I − F Fᵀ leads from another basis of the
    stream into this one.
    """

    encode: Operator
    decode: Operator
    offset: Float64[Tensor, "c dg"] | None
    entry: Float64[Tensor, "k r"] | None

    def __init__(
        self,
        encode: Operator | Float64[Tensor, "c d k"],
        decode: Operator | Float64[Tensor, "c d k"] | Float64[Tensor, "c dg kg"],
        offset: Float64[Tensor, "c dg"] | None = None,
        entry: Float64[Tensor, "k r"] | None = None,
    ) -> None:
        object.__setattr__(self, "encode", as_operator(encode))
        object.__setattr__(self, "decode", as_operator(decode))
        object.__setattr__(self, "offset", offset)
        object.__setattr__(self, "entry", entry)

    @property
    def width(self) -> int:
        return self.encode.width

    def read(self, space: Space, x: Float[Tensor, "*n w"]) -> Float[Tensor, "*n w"]:
        """What readers get of a signal, D Eᵀ x + offset, in its dtype; its last axis holds the runs of all heads."""
        runs = x.shape[-1] // space.seen
        seen = self.decode.grained(space.seen // self.decode.dim)
        back = seen.back(self.encode.grained(space.grain).contract(x, runs=runs), runs=runs)
        if self.offset is None:
            return back
        return (back.unflatten(-1, (runs, -1)) + spread(self.offset.to(x), runs)).flatten(-2)

    def columns(self, kept: Int[Tensor, "*c k"]) -> Change:
        """The slice that keeps some directions of a rotation, in that order."""
        return Change(self.encode.columns(kept), self.decode.columns(kept))

    def take(self, copies: Int[Tensor, " c"]) -> Change:
        """The same of some copies."""
        return Change(self.encode.take(copies), self.decode.take(copies))

    @classmethod
    def rotation(cls, A: Operator | Float64[Tensor, "c d d"]) -> Change:
        A = as_operator(A)
        return cls(A, A.dual())

    @classmethod
    def empty(cls, space: Space, k: int) -> Change:
        """Of the right shape and no content: readers get zeros. To build a model that is then loaded from disk, and
        with k = 0 to let a branch go."""
        E = Pick.first(space.copies, space.dim, k)
        return cls(E, E.scaled(torch.zeros(E.index.shape, dtype=torch.float64, device="cpu")))

    @classmethod
    def choice(cls, space: Space, kept: Int[Tensor, " k"]) -> Change:
        """The slice that keeps some coordinates as they are, of every copy the same."""
        E = Pick.of(kept, space.copies, space.dim)
        return cls(E, E)


def bridge(source: Change, target: Change) -> Float64[Tensor, "s t"]:
    """D_sᵀ E_t: what carries the stream from one basis into another."""
    return target.encode.contract(source.decode.matrix()[0].mT)
