"""Random elements of the groups: what certificates try on all spaces at once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from .analysis import Derived
from .block import Block, Kind


@dataclass(frozen=True, eq=False)
class Element:
    """matrices: A of x → A x per block; orders: the permutation per block; scales: (log scale, sign bit) per root."""

    matrices: Mapping[Block, np.ndarray]
    orders: Mapping[Block, np.ndarray]
    swapped: frozenset[Block]
    scales: Mapping[int, tuple[float, int]]


def draw(
    derived: Derived, blocks: Iterable[Block], rng: np.random.Generator, scales: bool = True
) -> Element:
    """One element of every block's group; ``scales``: of all free scales and signs too."""
    matrices, orders, swapped = {}, {}, set()
    for b in blocks:
        if b.kind is Kind.NODES:
            swapped.add(b)
        elif b.kind is Kind.PERM:
            orders[b] = permutation(len(b.classes), rng)
        else:
            matrices[b] = matrix(b.kind, len(b.classes), rng)
    return Element(matrices, orders, frozenset(swapped), derived.scales.draw(rng) if scales else {})


def permutation(n: int, rng: np.random.Generator) -> np.ndarray:
    """A permutation that moves something."""
    order = rng.permutation(n)
    return order if n < 2 or (order != np.arange(n)).any() else np.roll(order, 1)


def matrix(kind: Kind, n: int, rng: np.random.Generator) -> np.ndarray:
    if kind is Kind.GL:
        return orthogonal(n, rng) @ np.diag(np.exp(rng.uniform(-0.7, 0.7, n))) @ orthogonal(n, rng)
    if kind is Kind.C:
        size, angle = math.exp(rng.uniform(-0.7, 0.7)), rng.uniform(0, 2 * math.pi)
        c, s = math.cos(angle), math.sin(angle)
        return size * np.array([[c, s], [-s, c]])
    if kind is Kind.O:
        return orthogonal(n, rng)
    return orthogonal_fixing_ones(n, rng)


def orthogonal(n: int, rng: np.random.Generator) -> np.ndarray:
    return np.linalg.qr(rng.normal(size=(n, n)))[0]


def orthogonal_fixing_ones(n: int, rng: np.random.Generator) -> np.ndarray:
    """Q with Q 1 = 1: any rotation of the space across from the vector of ones."""
    frame = np.linalg.qr(np.c_[np.ones(n), rng.normal(size=(n, n - 1))])[0]
    inner = np.eye(n)
    inner[1:, 1:] = orthogonal(n - 1, rng)
    return frame @ inner @ frame.T
