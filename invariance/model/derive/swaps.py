"""Fibres that can change places: heads and experts, with all coordinates below them.

A swap of two nodes is an automorphism of what met what: the ids below both are paired in order, and so are the ids that
each of them met, op by op, until everything that is reached is paired or something does not fit.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from .ids import Ids

Swap = dict[int, int]


class Swaps:
    """The graph of ids: what lies below what, and what met what in which op."""

    def __init__(self, ids: Ids, frozen: Callable[[int], bool]) -> None:
        self.ids, self.frozen = ids, frozen
        self.sets = {frozenset(s.tolist()) for s in ids.sets.values()}
        self.sets_of: dict[int, list[frozenset[int]]] = defaultdict(list)
        for s in self.sets:
            for a in s:
                self.sets_of[a].append(s)
        self.parents: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
        for node, lists in ids.children.items():
            for below in lists:
                for j, a in enumerate(below):
                    self.parents[a].append((node, len(below), j))
        self._index_meetings()

    def _index_meetings(self) -> None:
        meetings = self.ids.meetings
        number = {op: i for i, op in enumerate(dict.fromkeys(op for op, _ in meetings))}
        empty = np.zeros((0, 2), np.int64)
        pairs = np.concatenate([empty, *(p for _, p in meetings)])
        event = np.repeat(np.arange(len(meetings)), [len(p) for _, p in meetings])
        key = np.concatenate((pairs[:, 0], pairs[:, 1]))
        to = np.concatenate((pairs[:, 1], pairs[:, 0]))
        when = np.concatenate((2 * event, 2 * event + 1))
        order = np.lexsort(
            (np.concatenate((2 * np.arange(len(pairs)), 2 * np.arange(len(pairs)) + 1)), when, key)
        )
        self.to, self.event = to[order], when[order]
        self.op = np.array([number[op] for op, _ in meetings for _ in (0, 1)], np.int64)
        self.start = np.searchsorted(key[order], np.arange(len(self.ids.parent) + 1))

    def groups(
        self,
        experts: Iterable[list[int]],
        carried: Mapping[int, object],
        closed: Callable[[Swap], bool],
    ) -> list[tuple[list[int], list[Swap]]]:
        """(nodes that change places, the swaps of the first with each other one).

        carried: where ids lie in weights. closed: whether a swap keeps every id on its axis.
        """
        nodes = [s for s in self.sets if len(s) > 1 and all(a in self.ids.children for a in s)]
        candidates = [*experts, *sorted((sorted(s) for s in nodes), key=lambda s: (-len(s), s))]
        done: set[int] = set()
        out = []
        for first, *others in candidates:
            if first in done:
                continue
            swaps, partners = [], []
            for other in others:
                swap = self.swap(first, other)
                if swap is not None and any(a in carried for a in swap) and closed(swap):
                    swaps.append(swap)
                    partners.append(other)
            for swap in swaps:
                done |= swap.keys()
            if swaps:
                out.append(([first, *partners], swaps))
        return out

    def swap(self, one: int, two: int) -> Swap | None:
        """The permutation of ids that exchanges two nodes; None where there is none."""
        image: Swap = {}
        todo = [(one, two)]
        while todo:
            a, b = todo.pop()
            if image.get(a, b) != b or image.get(b, a) != a:
                return None
            if a in image:
                continue
            image[a], image[b] = b, a
            if a != b:
                more = self._neighbours(a, b)
                if more is None:
                    return None
                todo += more
        moved = {a: b for a, b in image.items() if a != b}
        touched = {s for a in moved for s in self.sets_of[a]}
        if any(frozenset(image.get(c, c) for c in s) not in self.sets for s in touched):
            return None
        return moved or None

    def _neighbours(self, a: int, b: int) -> list[tuple[int, int]] | None:
        """Pairs that must change places when ``a`` and ``b`` do; None where they cannot."""
        ids = self.ids
        if self.frozen(a) or ids.colours.get(a) != ids.colours.get(b):
            return None
        out: list[tuple[int, int]] = []
        below, beneath = ids.children.get(a, []), ids.children.get(b, [])
        if list(map(len, below)) != list(map(len, beneath)):
            return None
        for p, q in zip(below, beneath, strict=True):
            out += zip(p, q, strict=True)
        x, y = slice(self.start[a], self.start[a + 1]), slice(self.start[b], self.start[b + 1])
        u, v = self.event[x], self.event[y]
        if len(u) != len(v) or (self.op[u] != self.op[v]).any():
            return None
        if ((u[1:] != u[:-1]) != (v[1:] != v[:-1])).any():
            return None
        out += zip(self.to[x].tolist(), self.to[y].tolist(), strict=True)
        above, over = self.parents[a], self.parents[b]
        if [z[1:] for z in above] != [z[1:] for z in over]:
            return None
        return out + [(p[0], q[0]) for p, q in zip(above, over, strict=True)]
