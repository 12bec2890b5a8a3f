"""Heads and experts that change places: what each generator of the group does to the positions of every axis."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..derive.block import Block, Kind
from .description import Move
from .source import Key, Line, Source


@dataclass(frozen=True)
class Swap:
    """Things that change places. ``codes``: the thing at each position; -1 where nothing moves.

    A move takes the k-th position of one thing on an axis to the k-th position of another.
    """

    stem: str
    width: int
    moves: tuple[Move, ...]
    codes: Mapping[Key, np.ndarray] = field(repr=False)


def swaps(source: Source, axes: Sequence[Line]) -> list[Swap]:
    """What can be said of the swaps found; what moves across parameters, or in another order, is not."""
    made = []
    for block in source.blocks:
        if block.kind is Kind.NODES and (swap := _swap(block, axes)) is not None:
            made.append(swap)
    return made


def _swap(block: Block, axes: Sequence[Line]) -> Swap | None:
    things: dict[
        tuple[Move, ...], int
    ] = {}  # what the generators do to an orbit: its first thing's number
    codes, width = dict[Key, np.ndarray](), 0
    stacks = set[str]()
    for line in axes:
        if line.parameter in stacks:
            continue  # whole slices move, all that is in them along
        found = _orbits(block.maps, line)
        if found is None:
            return None
        if not found:
            continue
        if line.dims == (0,) and any(
            x.parameter == line.parameter and len(x.dims) > 1 for x in axes
        ):
            stacks.add(line.parameter)
        code = np.full(len(line.ids), -1)
        for orbit, action in found:
            if action not in things:
                things[action] = width
                width += len(orbit)
            code[orbit] = things[action] + np.arange(len(orbit))
        codes[line.key] = code
    moves = []
    for g in range(len(block.maps)):
        pairs = [(first + a, first + b) for action, first in things.items() for a, b in action[g]]
        moves.append(tuple(sorted(pairs)))
    told = all(_in_order(codes[x.key], moves, block.maps, x) for x in axes if x.key in codes)
    if not codes or not told:
        return None
    return Swap(block.stem, width, tuple(m for m in moves if m), codes)


def _orbits(
    maps: Sequence[Mapping[int, int]], line: Line
) -> list[tuple[np.ndarray, tuple[Move, ...]]] | None:
    """Positions that come to each other, and what each generator does among them; None: it leads off the axis."""
    at = {a: p for p, a in enumerate(line.ids.tolist())}
    images = []
    near = defaultdict[int, set[int]](set)
    for pi in maps:
        image = {}
        for a, p in at.items():
            b = pi.get(a, a)
            if b not in at:
                return None
            if b != a:
                image[p] = at[b]
                near[p].add(at[b])
        images.append(image)
    found, done = [], set[int]()
    for p in sorted(near):
        if p in done:
            continue
        orbit, todo = set[int](), [p]
        while todo:
            q = todo.pop()
            if q not in orbit:
                orbit.add(q)
                todo += near[q]
        done |= orbit
        order = np.array(sorted(orbit))
        number = {q: i for i, q in enumerate(order.tolist())}
        action = tuple(
            tuple(sorted((number[q], number[r]) for q, r in image.items() if q in orbit and q < r))
            for image in images
        )
        found.append((order, action))
    return found


def _in_order(
    code: np.ndarray, moves: Sequence[Move], maps: Sequence[Mapping[int, int]], line: Line
) -> bool:
    """Whether moving things, k-th position to k-th position, is what the derivation said."""
    return all(
        (line.ids[moved(code, move)] == [pi.get(a, a) for a in line.ids.tolist()]).all()
        for move, pi in zip(moves, maps, strict=True)
    )


def moved(code: np.ndarray, move: Move) -> np.ndarray:
    """Of each position, the one that takes its place."""
    source = np.arange(len(code))
    for a, b in move:
        p, q = np.flatnonzero(code == a), np.flatnonzero(code == b)
        source[p], source[q] = q, p
    return source
