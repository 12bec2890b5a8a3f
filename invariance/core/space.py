"""Spaces, their groups, and changes of basis: the algebra on which everything else stands."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import Enum
from functools import cached_property

import torch
from einops import einsum
from jaxtyping import Bool, Float, Float64, Int
from scipy.stats import ortho_group
from torch import Tensor

RTOL = 1e-9  # how far an element may be from its group, relative to its largest entry


class Group(Enum):
    """The changes of basis of a space that leave the network's function unchanged.

    ``a <= b`` reads "every element of a is an element of b". Elements act on column vectors as Aᵀx.
    """

    IDENTITY = "identity"
    PERMUTATION = "permutation"
    SIGNED_PERMUTATION = "signed permutation"
    POSITIVE_MONOMIAL = "permutation and positive scale"  # under ReLU
    MONOMIAL = "permutation and scale"  # the linear branch of a gated MLP
    ORTHOGONAL = "orthogonal"
    ROTARY = (  # under rotary positions; invertible on the dims they spare
        "frequency pairs permuted, their frequencies moving along, one complex scale each"
    )
    INVERTIBLE = "invertible"

    def __le__(self, other: Group) -> bool:
        return other is self or any(wider <= other for wider in _WIDER[self])

    @property
    def why(self) -> str:
        """The reason that the group is no wider, for error messages."""
        return _WHY[self]


_WIDER: dict[Group, tuple[Group, ...]] = {
    Group.IDENTITY: (Group.PERMUTATION, Group.ROTARY),
    Group.PERMUTATION: (Group.SIGNED_PERMUTATION, Group.POSITIVE_MONOMIAL),
    Group.SIGNED_PERMUTATION: (Group.ORTHOGONAL, Group.MONOMIAL),
    Group.POSITIVE_MONOMIAL: (Group.MONOMIAL,),
    Group.MONOMIAL: (Group.INVERTIBLE,),
    Group.ORTHOGONAL: (Group.INVERTIBLE,),
    Group.ROTARY: (Group.INVERTIBLE,),
    Group.INVERTIBLE: (),
}
_WHY = {
    Group.IDENTITY: "nothing else commutes with what reads the space",
    Group.PERMUTATION: "an elementwise activation sits between its writers and its readers",
    Group.SIGNED_PERMUTATION: "norms with gains stand between what writes the space and the space",
    Group.POSITIVE_MONOMIAL: "ReLU commutes with permutations and positive scales alone",
    Group.MONOMIAL: "an activation sits on the gate and only the linear branch may be scaled",
    Group.ORTHOGONAL: "the norm that reads the space divides by the length of its input",
    Group.ROTARY: "rotary positions turn each frequency pair by its own angle",
    Group.INVERTIBLE: "only a singular matrix loses information",
}


@dataclass(frozen=True)
class Space:
    """A vector space that activations live in, between the weights that write and read it.

    ``dim`` is the width of one copy, ``copies`` the number of independent ones (KV heads), ``rotary`` how many
    leading dims carry rotary positions, as pairs (j, j + rotary/2). ``grain`` is how many numbers stand for one
    direction in what readers see: of a KV group, the values of all its query heads. ``normed``: a norm over all its dims
    stands between what writes it and what reads it. ``even`` is, inside a matrix, the rank in·out/(in + out) at which two
    factors store as much as the matrix.
    """

    name: str
    kind: str  # residual, mlp, vo, qk, heads or edge
    dim: int
    group: Group
    copies: int = 1
    rotary: int = 0
    grain: int = 1
    normed: bool = False
    even: float | None = None

    @property
    def seen(self) -> int:
        """The width of one copy as readers see it."""
        return self.dim * self.grain

    @property
    def why(self) -> str:
        """The reason that its group is no wider, for error messages."""
        if self.normed:
            return "a norm divides by the length over all its dims, which no change of basis and no cut passes"
        return "every head has a softmax of its own" if self.kind == "heads" else self.group.why

    def admits(self, group: Group) -> bool:
        return group <= self.group

    def generator(self, seed: int) -> torch.Generator:
        """A random generator that depends on the seed and the space's name alone (not on Python's hash)."""
        digest = hashlib.sha256(f"{seed}:{self.name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

    def element(self, seed: int) -> Float64[Tensor, "c d d"]:
        """A random element of the space's group per copy, condition number at most 4.

        Orthogonal: Haar measure. Invertible: Haar × diag(s) × Haar, s log-uniform in [1/2, 2].
        Rotary: pairs permuted, one complex scale of modulus in [1/2, 2] each, an invertible matrix on the dims beyond.
        """
        g = self.generator(seed)
        return torch.stack(
            [_element(self.group, self.dim, self.rotary, g) for _ in range(self.copies)]
        )

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

    def contains(self, A: Float64[Tensor, "c d d"], rtol: float = RTOL) -> bool:
        """Whether every copy of A is an element of the space's group, to rtol of its largest entry."""
        return A.shape == (self.copies, self.dim, self.dim) and in_group(
            self.group, A, self.rotary, rtol
        )


@dataclass(frozen=True)
class Basis:
    """An exact change of basis: new coordinates are Aᵀx; ``energy`` is what is lost if a direction goes.

    Slicers keep from the left, the columns ``Space.kept(k)``: what cutting to k loses is the sum of the energies from
    k on. They fall, unless the rotator is ``nested``, and stand in the order in which directions are kept: where rotary
    positions turn pairs (i, i + half), what they spare, then pair after pair, each of its two dims with half of it.
    """

    A: Float64[Tensor, "c d d"]
    energy: Float64[Tensor, "c d"]


@dataclass(frozen=True, eq=False)
class Change:
    """A change on a space: ``encode`` acts on everything that writes it, ``decode`` on everything that reads it.

    A signal x becomes Eᵀx, and is read back as D Eᵀ x + offset, if there is one. With k = d, E = A and D = A⁻ᵀ it is a
    rotation: exact when A is in the group. With k < d, E Dᵀ is a projector: a slice. On a space with a grain g,
    ``decode`` may also act on all numbers that readers see, (c, d·g, k·g): directions that stay then make up for those
    that go. ``offset`` always speaks of what readers see. ``entry`` is F where a low-rank shortcut I − F Fᵀ leads from
    another basis of the stream into this one.
    """

    encode: Float64[Tensor, "c d k"]
    decode: Float64[Tensor, "c d k"] | Float64[Tensor, "c dg kg"]
    offset: Float64[Tensor, "c dg"] | None = (
        None  # in the coordinates of x; goes into the readers' biases
    )
    entry: Float64[Tensor, "k r"] | None = None

    @property
    def width(self) -> int:
        return self.encode.shape[-1]

    @cached_property
    def write_picks(self) -> Int[Tensor, " k"] | None:
        """``picks`` of ``encode``, of the first copy."""
        return picks(self.encode[0])

    @cached_property
    def read_picks(self) -> Int[Tensor, " k"] | None:
        """``picks`` of ``decode``, of the first copy."""
        return picks(self.decode[0])

    def read(self, space: Space, x: Float[Tensor, "*n w"]) -> Float[Tensor, "*n w"]:
        """What readers get of a signal, D Eᵀ x + offset, in its dtype; its last axis holds the runs of all heads."""
        E, D, d, g = self.encode.to(x), self.decode.to(x), space.dim, space.grain
        runs = x.unflatten(-1, (space.copies, -1, d, g))
        kept = einsum(runs, E, "... c r d g, c d k -> ... c r k g")
        if D.shape[-2] == d:
            back = einsum(kept, D, "... c r k g, c d k -> ... c r d g").flatten(-2)
        else:
            back = einsum(kept.flatten(-2), D, "... c r k, c d k -> ... c r d")
        if self.offset is not None:
            back = back + self.offset.to(x).unsqueeze(-2)
        return back.flatten(-3)

    @classmethod
    def rotation(cls, A: Float64[Tensor, "c d d"]) -> Change:
        found = A != 0
        if not A.is_meta and all(bool((found.sum(i) == 1).all()) for i in (-1, -2)):  # monomial
            return cls(A, torch.where(found, 1 / A, 0.0))
        return cls(A, torch.linalg.inv(A).mT.contiguous())

    @classmethod
    def empty(cls, space: Space, k: int) -> Change:
        """Of the right shape and no content: readers get zeros. To build a model that is then loaded from disk, and
        with k = 0 to let a branch go."""
        E = torch.eye(space.dim, k, dtype=torch.float64).repeat(space.copies, 1, 1)
        return cls(E, torch.zeros_like(E))


def support(X: Float64[Tensor, "*c d k"]) -> Bool[Tensor, "*c d k"]:
    """Where a matrix is not zero, to the rounding that ``Space.contains`` allows."""
    return X.abs() > RTOL * X.abs().amax() if X.numel() and not X.is_meta else X != 0


def picks(X: Float64[Tensor, "d k"]) -> Int[Tensor, " k"] | None:
    """Which row each column of a matrix picks, and scales; None where one mixes several."""
    found = support(X)
    return found.int().argmax(0) if not X.is_meta and bool((found.sum(0) == 1).all()) else None


def in_group(
    group: Group, A: Float64[Tensor, "c d d"], rotary: int = 0, rtol: float = RTOL
) -> bool:
    """Whether every copy of A is an element of the group, to rtol of its largest entry."""
    A = A.double()
    d = A.shape[-1]
    scale = A.abs().amax().item()
    if not (torch.isfinite(A).all() and scale > 0):
        return False
    tol = rtol * scale
    eye = torch.eye(d, dtype=A.dtype, device=A.device).expand_as(A)
    if group is Group.IDENTITY:
        return bool((A - eye).abs().amax() <= tol)
    if group is Group.ORTHOGONAL:
        return bool((A.mT @ A - eye).abs().amax() <= rtol * d)
    if group is Group.ROTARY:
        whole = not rotary or (
            (kept := pairs_kept(A, rotary, rtol)) is not None and kept.shape[1] == rotary // 2
        )
        return whole and _invertible(A)
    if group is Group.INVERTIBLE:
        return _invertible(A)
    support = A.abs() > tol
    monomial = bool((support.sum(-1) == 1).all() and (support.sum(-2) == 1).all())
    entries = A[support]
    if group is Group.PERMUTATION:
        return monomial and bool((entries - 1).abs().amax() <= tol)
    if group is Group.SIGNED_PERMUTATION:
        return monomial and bool((entries.abs() - 1).abs().amax() <= tol)
    return monomial and (group is Group.MONOMIAL or bool((entries > 0).all()))


def _invertible(A: Float64[Tensor, "c d d"]) -> bool:
    return bool((torch.linalg.cond(A) < 1e12).all())


def columns(rotary: int, pairs: int, rest: int) -> Int[Tensor, " k"]:
    """The dims of the first pairs among ``rotary`` dims, and of the first that rotary positions spare."""
    i = torch.arange(pairs, device="cpu")  # whatever device modules are being built on
    return torch.cat((i, i + rotary // 2, rotary + torch.arange(rest, device="cpu")))


def pairs_kept(
    X: Float64[Tensor, "c d k"], rotary: int, rtol: float = RTOL
) -> Int[Tensor, "c n"] | None:
    """Which frequency pair (j, j + rotary/2) each pair of columns (i, i + n) keeps, up to one complex scale.

    None where X is anything else: where columns mix pairs, split one, or mix them with the dims that rotary positions
    spare, which take the last columns. The number n of pairs kept is that of all copies.
    """
    if X.is_meta or not X.numel():
        return None
    tol = rtol * X.abs().amax()
    h, turned = rotary // 2, (X[:, :rotary].abs() > tol).any(1)
    n = int(turned[0].sum()) // 2
    leading = torch.arange(X.shape[-1], device=X.device) < 2 * n
    if (
        not n
        or not torch.equal(turned, leading.expand_as(turned))
        or bool((X[:, rotary:, : 2 * n].abs() > tol).any())
    ):
        return None
    left, right = X[:, :rotary, :n], X[:, :rotary, n : 2 * n]
    a, b, c, d = left[:, :h], left[:, h:], right[:, :h], right[:, h:]
    size = a.abs() + b.abs()
    complex_scale = torch.maximum((a - d).abs(), (b + c).abs()).amax() <= tol
    one_each = bool(((size > tol).sum(1) == 1).all())
    return size.argmax(1) if complex_scale and one_each else None


def _scales(n: int, g: torch.Generator) -> Float64[Tensor, " n"]:
    return 2 ** (2 * torch.rand(n, generator=g, dtype=torch.float64) - 1)


def haar(d: int, g: torch.Generator) -> Float64[Tensor, "d d"]:
    """An orthogonal matrix from Haar measure."""
    if d == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    seed = int(torch.randint(2**31, (), generator=g))
    return torch.from_numpy(ortho_group.rvs(d, random_state=seed)).double()


def _element(group: Group, d: int, rotary: int, g: torch.Generator) -> Float64[Tensor, "d d"]:
    eye = torch.eye(d, dtype=torch.float64)
    if group is Group.IDENTITY:
        return eye
    if group is Group.ORTHOGONAL:
        return haar(d, g)
    if group is Group.INVERTIBLE:
        return (haar(d, g) * _scales(d, g)) @ haar(d, g) if d else eye
    if group is Group.ROTARY:
        h = rotary // 2
        i, j = torch.arange(h), torch.randperm(h, generator=g)
        angle = 2 * torch.pi * torch.rand(h, generator=g, dtype=torch.float64)
        r = _scales(h, g)
        A = torch.zeros_like(eye)
        A[j, i] = A[j + h, i + h] = r * angle.cos()
        A[j, i + h], A[j + h, i] = r * angle.sin(), -r * angle.sin()
        A[rotary:, rotary:] = _element(Group.INVERTIBLE, d - rotary, 0, g)
        return A
    P = eye[:, torch.randperm(d, generator=g)]
    sign = 1 - 2 * torch.randint(2, (d,), generator=g).double()
    if group is Group.SIGNED_PERMUTATION:
        return P * sign
    if group is Group.POSITIVE_MONOMIAL:
        return P * _scales(d, g)
    return P * sign * _scales(d, g) if group is Group.MONOMIAL else P
