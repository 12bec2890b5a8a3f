"""Positions of an axis in few words: runs of a space's coordinates, and loops around runs that repeat with a shift."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

LONGEST = 512  # runs in the body of a loop that is looked for
MOST = 20_000  # runs; an axis with more stays as it is

Power = int | Fraction


def whole(power: Fraction) -> Power:
    """An integer where it is one."""
    return power.numerator if power.denominator == 1 else power


@dataclass(frozen=True)
class Symbol:
    """A space and the powers with which its scales come; no powers: each is 1. An empty space is no space."""

    space: str
    powers: tuple[Power, ...] = ()

    def __str__(self) -> str:
        return self.space + (f"^{','.join(map(str, self.powers))}" if self.powers else "")

    @staticmethod
    def parse(text: str) -> Symbol:
        space, _, powers = text.partition("^")
        return Symbol(space, tuple(whole(Fraction(p)) for p in powers.split(",")) if powers else ())


RIGID = Symbol("-")  # nothing changes these positions
BARE = Symbol("")


@dataclass(frozen=True)
class Run:
    """``count`` positions; the i-th has the code ``start + Σ coefficient · variable + step · i``.

    A rigid run of count 0 is an axis of any length.
    """

    symbol: Symbol
    count: int
    start: int = 0
    step: int = 1
    shifts: tuple[tuple[int, int], ...] = ()  # (variable of a loop around, coefficient)


@dataclass(frozen=True)
class Loop:
    """The body ``count`` times, its variable counting from 0."""

    variable: int
    count: int
    body: tuple[Node, ...]


Node = Run | Loop
Pattern = tuple[Node, ...]


def expand(
    pattern: Sequence[Node], at: Mapping[int, int] = {}
) -> Iterator[tuple[Symbol, np.ndarray]]:
    """Every run at full length, in order."""
    for node in pattern:
        if isinstance(node, Loop):
            for i in range(node.count):
                yield from expand(node.body, {**at, node.variable: i})
        else:
            start = node.start + sum(c * at[v] for v, c in node.shifts)
            yield node.symbol, start + node.step * np.arange(node.count)


def length(pattern: Sequence[Node]) -> int:
    """How many positions a pattern has; 0 where it says any number."""
    return sum(n.count * (length(n.body) if isinstance(n, Loop) else 1) for n in pattern)


def compress(symbols: Sequence[Symbol], which: np.ndarray, codes: np.ndarray) -> Pattern:
    """The pattern of an axis: position p has the symbol ``symbols[which[p]]`` and the code ``codes[p]``."""
    runs = [
        Run(RIGID, n) if symbols[s] == RIGID else Run(symbols[s], n, start, step)
        for s, n, start, step in _runs(which, codes)
    ]
    runs = _split(runs)
    return _numbered(_loops(runs)) if len(runs) <= MOST else tuple(runs)


def bare(codes: np.ndarray, size: int) -> Pattern:
    """The pattern of codes alone, where every ``size`` of them are a thing of their own (a block of a space)."""
    zero = np.zeros(size, np.int64)
    blocks = [codes[i : i + size] for i in range(0, len(codes), size)]
    runs = [
        Run(BARE, n, start, step) for b in blocks for _, n, start, step in _runs(zero[: len(b)], b)
    ]
    return _numbered(_loops(runs))


def _runs(which: np.ndarray, codes: np.ndarray) -> Iterator[tuple[int, int, int, int]]:
    """Longest runs of one symbol whose code advances by a constant: symbol, count, start, step."""
    change = np.flatnonzero(np.diff(which)) + 1
    step = np.diff(codes)
    turn = np.flatnonzero(np.diff(step)) + 1
    p, n = 0, len(codes)
    while p < n:
        k = np.searchsorted(change, p, side="right")
        end = int(change[k]) if k < len(change) else n
        k = np.searchsorted(turn, p, side="right")
        stop = min(end, int(turn[k]) + 1 if k < len(turn) else n)
        count = max(1, stop - p)
        yield int(which[p]), count, int(codes[p]), int(step[p]) if count > 1 else 1
        p += count


def _split(runs: list[Run]) -> list[Run]:
    """Long runs split where others of their space begin or end: heads that follow each other stay heads."""
    cuts = defaultdict[Symbol, set[int]](set)
    for r in runs:
        if r.step == 1 and r.symbol != RIGID:
            cuts[r.symbol] |= {r.start, r.start + r.count}
    fine = []
    for r in runs:
        inner = [c for c in sorted(cuts[r.symbol]) if r.start < c < r.start + r.count]
        if r.step != 1 or not inner or len(inner) > LONGEST:
            fine.append(r)
            continue
        for a, b in zip([r.start, *inner], [*inner, r.start + r.count], strict=True):
            fine.append(Run(r.symbol, b - a, a))
    return fine


def _shape(node: Node) -> object:
    if isinstance(node, Run):
        return node.symbol, node.count, node.step, node.shifts
    return node.count, tuple(_shape(n) for n in node.body)


def _starts(node: Node) -> list[int]:
    return [node.start] if isinstance(node, Run) else [s for n in node.body for s in _starts(n)]


def _shifted(node: Node, deltas: Iterator[int], variable: int) -> Node:
    if isinstance(node, Loop):
        return Loop(
            node.variable, node.count, tuple(_shifted(n, deltas, variable) for n in node.body)
        )
    c = next(deltas)
    shifts = (*node.shifts, (variable, c)) if c else node.shifts
    return Run(node.symbol, node.count, node.start, node.step, shifts)


def _loops(runs: Sequence[Node]) -> list[Node]:
    """Neighbours that repeat with constant shifts become loops; the shortest bodies first."""
    nodes, variable, size = list(runs), 0, 1
    while size <= min(len(nodes) // 2, LONGEST):
        found = _fold(nodes, size, variable)
        if len(found) < len(nodes):
            nodes, variable, size = found, variable + 1, 1
        else:
            size += 1
    return nodes


def _fold(nodes: list[Node], size: int, variable: int) -> list[Node]:
    shapes, starts = [_shape(n) for n in nodes], [_starts(n) for n in nodes]
    made: list[Node] = []
    i = 0
    while i < len(nodes):
        count, delta = 1, list[int]()
        while shapes[i + count * size : i + (count + 1) * size] == shapes[i : i + size]:
            before = [s for x in starts[i + (count - 1) * size : i + count * size] for s in x]
            after = [s for x in starts[i + count * size : i + (count + 1) * size] for s in x]
            now = [b - a for a, b in zip(before, after, strict=True)]
            if delta and now != delta:
                break
            delta, count = now, count + 1
        if count > 1:
            deltas = iter(delta)
            body = tuple(_shifted(n, deltas, variable) for n in nodes[i : i + size])
            made.append(Loop(variable, count, body))
        else:
            made.append(nodes[i])
        i += count * size if count > 1 else 1
    return made


def _numbered(nodes: Sequence[Node]) -> Pattern:
    """Variables by height: the innermost loop's is the first."""

    def height(node: Node) -> int:
        return 0 if isinstance(node, Run) else 1 + max(height(n) for n in node.body)

    def go(node: Node, names: Mapping[int, int]) -> Node:
        if isinstance(node, Loop):
            mine = height(node) - 1
            inner = {**names, node.variable: mine}
            return Loop(mine, node.count, tuple(go(n, inner) for n in node.body))
        shifts = tuple(sorted(((names[v], c) for v, c in node.shifts), reverse=True))
        return Run(node.symbol, node.count, node.start, node.step, shifts)

    return tuple(go(n, {}) for n in nodes)


def symbols(pattern: Sequence[Node]) -> set[Symbol]:
    """All symbols of a pattern."""
    return {
        s
        for n in pattern
        for s in (symbols(n.body) if isinstance(n, Loop) else {n.symbol})
        if s != RIGID
    }
