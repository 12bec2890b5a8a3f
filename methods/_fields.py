"""Finite fields, as far as Paley's matrices need them: the quadratic character of every difference."""

from __future__ import annotations

import itertools
import math
from functools import cache

import torch
from jaxtyping import Float64
from torch import Tensor


def prime_power(q: int) -> tuple[int, int] | None:
    """(p, m) with q = p^m and p prime, or None."""
    if q < 2:
        return None
    p = next((n for n in range(2, math.isqrt(q) + 1) if q % n == 0), q)
    m = round(math.log(q, p))
    return (p, m) if p**m == q else None


@cache
def powers(p: int, m: int) -> tuple[tuple[int, ...], ...]:
    """All q - 1 elements of GF(p^m) except 0, as the powers of one of them; coefficients from the constant up.

    The search is over the polynomials f of degree m: residues of GF(p)[x] modulo f of which x runs through all but 0
    before it comes back to 1 are invertible, so f is irreducible (primitive, even) and they are the field.
    """
    one = (1, *[0] * (m - 1))
    for f in itertools.product(
        range(1, p), *[range(p)] * (m - 1)
    ):  # x^m = f[0] + f[1] x + ..., f[0] not 0
        found = [one]
        while len(found) < p**m:
            *low, top = found[-1]
            following = tuple(
                (a + top * b) % p for a, b in zip((0, *low), f, strict=True)
            )  # times x
            if following == one:
                break
            found.append(following)
        if len(found) == p**m - 1:
            return tuple(found)
    raise ValueError(f"no field of {p}^{m} elements: {p} is not prime")


def character(p: int, m: int) -> Float64[Tensor, "q q"]:
    """Jacobsthal's matrix of GF(p^m), p odd: 1 where a - b is a square, -1 where it is none, 0 where a = b."""
    q = p**m
    value = torch.zeros(q, dtype=torch.float64)
    place = [p**i for i in range(m)]  # an element's number has its coefficients as digits
    for exponent, element in enumerate(powers(p, m)):
        value[sum(a * n for a, n in zip(element, place, strict=True))] = (-1) ** exponent
    number, index = torch.arange(q), torch.zeros(q, q, dtype=torch.int64)
    for n in place:
        digit = number // n % p
        index += (digit[:, None] - digit) % p * n
    return value[index]
