"""Spaces: where activations live, between the weights that write and read them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from .dense import Dense, in_group
from .group import Group
from .kind import Kind
from .operator import Operator
from .pick import Pick


@dataclass(frozen=True)
class Space:
    """A vector space that activations live in, between the weights that write and read it.

    ``dim`` is the width of one copy, ``copies`` the number of independent ones (KV heads), ``rotary`` how many
    leading dims carry rotary positions, as pairs (j, j + rotary/2). ``grain`` is how many numbers stand for one
    direction in what readers see: of a KV group, the values of all its query heads. ``normed``: a norm over all its dims
    stands between what writes it and what reads it. ``even`` is, inside a matrix, the rank in·out/(in + out) at which two
    factors store as much as the matrix. ``block`` and ``stage`` say by number where it lies, ``part`` in which matrix of
    the stage; the stream's last point is in the block behind the last one. ``least`` is how many directions have to stay: of
    experts, as many as a token takes.
    """

    name: str
    kind: Kind
    dim: int
    group: Group
    copies: int = 1
    rotary: int = 0
    grain: int = 1
    normed: bool = False
    even: float | None = None
    block: int | None = None
    stage: int | None = None
    part: str | None = None
    least: int = 1

    @property
    def seen(self) -> int:
        """The width of one copy as readers see it."""
        return self.dim * self.grain

    @property
    def why(self) -> str:
        """The reason that its group is no wider, for error messages."""
        if self.normed:
            return "a norm divides by the length over all its dims, which no change of basis and no cut passes"
        whole = {
            Kind.HEADS: "every head has a softmax of its own",
            Kind.EXPERTS: "a router takes experts one by one",
        }
        return whole.get(self.kind, self.group.why)

    def admits(self, group: Group) -> bool:
        return group <= self.group

    def generator(self, seed: int) -> torch.Generator:
        """A random generator that depends on the seed and the space's name alone (not on Python's hash)."""
        digest = hashlib.sha256(f"{seed}:{self.name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

    def element(self, seed: int) -> Operator:
        """A random element of the space's group per copy, condition number at most 4.

        Orthogonal: Haar measure. Invertible: Haar × diag(s) × Haar, s log-uniform in [1/2, 2].
        Rotary: pairs permuted, one complex scale of modulus in [1/2, 2] each, an invertible matrix on the dims beyond.
        """
        g = self.generator(seed)
        if self.group is Group.IDENTITY:
            return Pick.first(self.copies, self.dim)
        if self.group <= Group.MONOMIAL:
            each = [_monomial(self.group, self.dim, g) for _ in range(self.copies)]
            index, scale = (torch.stack(part) for part in zip(*each, strict=True))
            return Pick(index, self.dim, None if self.group is Group.PERMUTATION else scale)
        drawn = [_element(self.group, self.dim, self.rotary, g) for _ in range(self.copies)]
        return Dense(torch.stack(drawn))

    @property
    def spared(self) -> int:
        """How many dims rotary positions spare; they come last."""
        return self.dim - self.rotary

    def share(self, fraction: float) -> float:
        """How many directions a fraction of the space is; inside a matrix, those that a fraction of its entries pays for."""
        return self.dim if fraction >= 1 else fraction * (self.even or self.dim)

    def fraction(self, k: int) -> float:
        """Which fraction of the space k directions are: the inverse of ``share``."""
        return 1.0 if k >= self.dim else k / (self.even or self.dim)

    def fits(self, k: int) -> bool:
        """Whether the space can be cut to k dims: with rotary positions, to whole pairs and all dims they spare; under a
        norm of its own, not at all; inside a matrix, to ranks at which two factors store less than it."""
        if self.normed:
            return k == self.dim
        if self.even is not None and self.even <= k < self.dim:
            return False
        if self.least > 1 and k < self.least:
            return False
        pairs = k - self.spared
        return 0 <= k <= self.dim and (not self.rotary or (pairs >= 2 and pairs % 2 == 0))

    def kept(self, k: int) -> Int[Tensor, " k"]:
        """Which columns of a basis a cut to k dims keeps: the first k; with rotary positions the first pairs.

        Ascending, so that the cut space has its pairs as (i, i + half) again, and what they spare behind.
        """
        if not self.fits(k):
            raise ValueError(
                f"space '{self.name}' cannot be cut to {k} dims: it would split a frequency pair"
            )
        return (
            columns(self.rotary, (k - self.spared) // 2, self.spared)
            if self.rotary
            else torch.arange(k)
        )

    def contains(self, A: Operator | Float64[Tensor, "c d d"]) -> bool:
        """Whether every copy of A is an element of the space's group, to rounding."""
        square = A.shape == (self.copies, self.dim, self.dim)
        return square and in_group(self.group, A, self.rotary)


def columns(rotary: int, pairs: int, rest: int) -> Int[Tensor, " k"]:
    """The dims of the first pairs among ``rotary`` dims, and of the first that rotary positions spare."""
    i = torch.arange(pairs, device="cpu")  # whatever device modules are being built on
    return torch.cat((i, i + rotary // 2, rotary + torch.arange(rest, device="cpu")))


def _scales(n: int, g: torch.Generator) -> Float64[Tensor, " n"]:
    return 2 ** (2 * torch.rand(n, generator=g, dtype=torch.float64) - 1)


def haar(d: int, g: torch.Generator) -> Float64[Tensor, "d d"]:
    """An orthogonal matrix from Haar measure."""
    if d == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    from scipy.stats import ortho_group  # a second to import, and few commands draw one

    seed = int(torch.randint(2**31, (), generator=g))
    return torch.from_numpy(ortho_group.rvs(d, random_state=seed)).double()


def _monomial(
    group: Group, d: int, g: torch.Generator
) -> tuple[Int[Tensor, " d"], Float64[Tensor, " d"]]:
    """Which coordinate each column picks, and its scale: signs, sizes or both, as the group has them."""
    index = torch.randperm(d, generator=g)
    sign = 1 - 2 * torch.randint(2, (d,), generator=g).double()
    if group is Group.SIGNED_PERMUTATION:
        return index, sign
    scale = torch.ones_like(sign) if group is Group.PERMUTATION else _scales(d, g)
    return index, sign * scale if group is Group.MONOMIAL else scale


def _element(group: Group, d: int, rotary: int, g: torch.Generator) -> Float64[Tensor, "d d"]:
    if group is Group.ORTHOGONAL:
        return haar(d, g)
    if group is Group.INVERTIBLE:
        eye = torch.eye(d, dtype=torch.float64)
        return (haar(d, g) * _scales(d, g)) @ haar(d, g) if d else eye
    h = rotary // 2
    i, j = torch.arange(h), torch.randperm(h, generator=g)
    angle = 2 * torch.pi * torch.rand(h, generator=g, dtype=torch.float64)
    r = _scales(h, g)
    A = torch.zeros(d, d, dtype=torch.float64)
    A[j, i] = A[j + h, i + h] = r * angle.cos()
    A[j, i + h], A[j + h, i] = r * angle.sin(), -r * angle.sin()
    A[rotary:, rotary:] = _element(Group.INVERTIBLE, d - rotary, 0, g)
    return A
