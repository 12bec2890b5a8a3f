"""Rotator `hadamard`: a randomised Hadamard matrix, of any order that one of four constructions reaches."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from jaxtyping import Float64
from scipy.linalg import circulant
from scipy.linalg import hadamard as sylvester
from torch import Tensor

from invariance.calibrate.moments import Moments
from invariance.core.change import Basis
from invariance.core.group import Group
from invariance.core.space import Space
from invariance.method.interfaces import Rotator, WidthLimit

from ._fields import character, prime_power


def why_none(d: int) -> str | None:
    """Why there is no Hadamard matrix of order d here, or None if there is one."""
    if factors(d) is not None:
        return None
    if d % 4:
        return f"no Hadamard matrix of order {d} exists: the order must be 1, 2 or a multiple of 4"
    return f"no construction known here (Sylvester, Paley at prime powers, Williamson 92) reaches order {d}"


@dataclass(frozen=True)
class Hadamard(Rotator, name="hadamard"):
    """H·diag(±1)/√d with H a Hadamard matrix: spreads every outlier over all directions. No calibration.

    H is a Kronecker product of Sylvester's matrices (powers of two), Paley's of both types (q + 1 for a prime power
    q = 3 mod 4, 2(q + 1) for q = 1 mod 4) and Williamson's of order 92. A width without one is refused by name: up to
    260, of the multiples of 4, these are 116, 156, 172, 188, 232, 236 and 260. All directions count alike. The signs
    are the same for the same space and ``seed``, which is the recipe's unless given here.

    Source: Ashkboos et al. 2024 (QuaRot), arXiv:2404.00456, section 3; Paley 1933; Baumert, Golomb and Hall 1962.
    """

    seed: int | None = None  # null: the recipe's
    produces = Group.ORTHOGONAL
    width_limit: ClassVar[WidthLimit] = staticmethod(why_none)

    def fit(self, space: Space, moments: Moments) -> Basis:
        H = hadamard(space.dim) / space.dim**0.5
        g = space.generator(self.seed or 0)
        sign = 1 - 2 * torch.randint(2, (space.copies, 1, space.dim), generator=g).double()
        return Basis(sign.mT * H, torch.ones(space.copies, space.dim, dtype=torch.float64))


def hadamard(d: int) -> Float64[Tensor, "d d"]:
    """A matrix of ±1 with orthogonal columns. Raises ValueError where no construction reaches the order."""
    orders = factors(d)
    if orders is None:
        raise ValueError(f"no Hadamard matrix of order {d}")
    H = torch.ones(1, 1, dtype=torch.float64)
    for order in orders:
        H = torch.kron(H, _elementary(order))
    return H


@cache
def factors(d: int) -> tuple[int, ...] | None:
    """Orders of elementary Hadamard matrices whose Kronecker product has order d, or None."""
    if d & (d - 1) == 0:
        return (d,)
    for order in sorted(
        (n for n in range(4, d + 1, 4) if d % n == 0 and _construction(n)), reverse=True
    ):
        rest = factors(d // order)
        if rest is not None:
            return (order, *rest)
    return None


def _construction(n: int) -> str | None:
    if n & (n - 1) == 0:
        return "sylvester"
    if n % 4 == 0 and prime_power(n - 1):
        return "paley 1"  # n - 1 = 3 mod 4 follows
    if n % 4 == 0 and n // 2 % 4 == 2 and prime_power(n // 2 - 1):
        return "paley 2"
    return "williamson" if n == 92 else None


def _elementary(n: int) -> Float64[Tensor, "n n"]:
    kind = _construction(n)
    if kind == "sylvester":
        return torch.from_numpy(sylvester(n)).double()
    if kind == "williamson":
        return _williamson92()
    q = n - 1 if kind == "paley 1" else n // 2 - 1
    S = _conference(q, skew=kind == "paley 1")
    eye = torch.eye(q + 1, dtype=torch.float64)
    if kind == "paley 1":
        return eye + S
    plus, minus = (
        torch.tensor([[1.0, 1], [1, -1]]).double(),
        torch.tensor([[1.0, -1], [-1, -1]]).double(),
    )
    return torch.kron(S, plus) + torch.kron(eye, minus)


def _conference(q: int, skew: bool) -> Float64[Tensor, "q1 q1"]:
    """Jacobsthal's matrix of GF(q), bordered: S Sᵀ = q I, skew for q = 3 and symmetric for q = 1 mod 4."""
    field = prime_power(q)
    assert field is not None
    S = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    S[1:, 1:] = character(*field)
    S[0, 1:] = 1
    S[1:, 0] = -1 if skew else 1
    return S


def _williamson92() -> Float64[Tensor, "92 92"]:
    """Four symmetric circulants of order 23 with A² + B² + C² + D² = 92 I, in Williamson's array."""
    rows = (
        "++---+---+-++-+---+---+",
        "+-++-++--++++++--++-++-",
        "+++---++-+-++-+-++---++",
        "+++-+++-+------+-+++-++",
    )
    A, B, C, D = (
        torch.from_numpy(circulant([1.0 if x == "+" else -1.0 for x in row])).double()
        for row in rows
    )
    array = ((A, B, C, D), (-B, A, -D, C), (-C, D, A, -B), (-D, -C, B, A))
    return torch.cat([torch.cat(row, 1) for row in array])
