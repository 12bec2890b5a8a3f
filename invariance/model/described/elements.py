"""A random element of every space's group."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from .description import Description, Kind, Space
from .pattern import expand

SPREAD = 0.7  # of log scales


@dataclass(frozen=True)
class Element:
    """What is done to a space's coordinates, in this order.

    matrices [copies, size, size] mix each block; coordinate c becomes what coordinate ``permutation[c]`` was (of a
    SWAP: thing c); then ``scales``, one factor a coordinate each, come with the powers that an axis says.
    """

    matrices: Tensor | None = field(default=None, repr=False)
    permutation: np.ndarray | None = field(default=None, repr=False)
    scales: tuple[Tensor, ...] = field(default=(), repr=False)


def blocks(space: Space) -> np.ndarray:
    """The coordinates of each block, [copies, size]."""
    if not space.blocks:
        return np.arange(space.width)[None]
    return np.concatenate([c for _, c in expand(space.blocks)]).reshape(space.copies, -1)


def elements(
    description: Description, seed: int = 0, only: Iterable[str] | None = None
) -> Mapping[str, Element]:
    """Of every space by its full name (or of those given), drawn alike whatever else is drawn."""
    spaces = description.flat().spaces
    chosen = spaces if only is None else {name: spaces[name] for name in only}
    order = {name: i for i, name in enumerate(spaces)}
    return {n: element(s, np.random.default_rng([seed, order[n]])) for n, s in chosen.items()}


def element(space: Space, rng: np.random.Generator) -> Element:
    each = blocks(space)
    copies, size = each.shape
    matrices, permutation = None, None
    match space.kind:
        case Kind.GL:
            stretch = np.exp(rng.uniform(-SPREAD, SPREAD, (copies, size)))
            matrices = (
                _orthogonal(rng, copies, size) * stretch[:, None] @ _orthogonal(rng, copies, size)
            )
        case Kind.O:
            matrices = _orthogonal(rng, copies, size)
        case Kind.O1:
            matrices = _fixing_ones(rng, copies, size)
        case Kind.C:
            r, t = np.exp(rng.uniform(-SPREAD, SPREAD, copies)), rng.uniform(0, 2 * np.pi, copies)
            matrices = np.array([[r * np.cos(t), -r * np.sin(t)], [r * np.sin(t), r * np.cos(t)]])
            matrices = matrices.transpose(2, 0, 1)
        case Kind.PERM:
            permutation = np.arange(space.width)
            for b in each:
                permutation[b] = rng.permutation(b)
        case Kind.SWAP:
            permutation = _word(space, rng)
    scales = tuple(torch.from_numpy(_scale(letter, space.width, rng)) for letter in space.scales)
    found = None if matrices is None else torch.from_numpy(np.ascontiguousarray(matrices))
    return Element(found, permutation, scales)


def _scale(letter: str, width: int, rng: np.random.Generator) -> np.ndarray:
    if letter == "±":
        return rng.choice([-1.0, 1.0], width)
    return np.exp(rng.uniform(-SPREAD, SPREAD, width))


def _orthogonal(rng: np.random.Generator, copies: int, size: int) -> np.ndarray:
    q, r = np.linalg.qr(rng.normal(size=(copies, size, size)))
    uniform: np.ndarray = q * np.sign(np.diagonal(r, axis1=1, axis2=2))[:, None]
    return uniform


def _fixing_ones(rng: np.random.Generator, copies: int, size: int) -> np.ndarray:
    """An orthogonal matrix of the complement of the ones, written in the old coordinates."""
    basis = np.linalg.qr(np.c_[np.ones(size), rng.normal(size=(size, size - 1))])[0]
    inner = np.zeros((copies, size, size))
    inner[:, 0, 0] = 1
    inner[:, 1:, 1:] = _orthogonal(rng, copies, size - 1)
    return basis @ inner @ basis.T


def _word(space: Space, rng: np.random.Generator) -> np.ndarray:
    """A product of generators that moves something."""
    image = still = np.arange(space.width)
    while space.moves and (image == still).all():
        for g in [*rng.permutation(len(space.moves)), *rng.integers(0, len(space.moves), 8)]:
            step = still.copy()
            for a, b in space.moves[g]:
                step[a], step[b] = b, a
            image = image[step]
    return image
