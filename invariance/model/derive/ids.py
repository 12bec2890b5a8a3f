"""Coordinates. Every element of every weight's axis has an id; ops merge coordinates and relate their scales.

Over the ids stand: classes (ids of one coordinate), scales (what an id may be multiplied by, with linear equations between
logarithms and between signs), marks (what an op forbids), colours (which constants it met), the sets that an op saw at once,
and nodes (one number above all coordinates of a head or an expert).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from enum import IntFlag
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .arrays import cores, unique_list, unique_pairs

Domain = Literal["both", "log", "sign"]
Equation = tuple[dict[int, int], Domain]  # Σ coefficient × scale = 0, for log scales, signs or both


class Mark(IntFlag):
    """What has been seen of a coordinate."""

    NO_MIX = 1  # may change places with others, never be added to them
    SELF = 2  # is contracted with itself: only orthogonal changes
    ONES = 4  # is summed with its neighbours: the vector of ones stays
    FROZEN = 8  # rigid: an op that is not understood, or the model's own input or output
    NODE = 16  # stands for a whole head or expert
    LEAD = 32  # is a place in a stack of matrices or vectors
    GAIN = 64  # is an element of a gain
    ACTIVATION = 128  # was contracted between two activations: queries and keys
    ROUTER = 256  # was chosen by top-k


class Ids:
    """Everything that is known of the coordinates of one trace."""

    def __init__(self) -> None:
        self.parent: list[int] = []  # forest of classes
        self.scale_parent: list[int] = []  # forest of scales: scale[a] = sign × scale[parent]
        self.scale_sign: list[int] = []
        self.marks: list[int] = []
        self.equations: list[Equation] = []
        self.units: set[int] = set()  # roots of the forest of scales whose scale is 1
        self.colours: dict[int, set[tuple]] = {}
        self.sets: dict[bytes, np.ndarray] = {}
        self.children: dict[
            int, list[list[int]]
        ] = {}  # node -> lists of the ids below it, in order
        self.meetings: list[tuple[str, np.ndarray]] = []  # per op, the pairs of ids that met
        self.frozen_by: dict[str, int] = {}  # op -> how many ids it froze
        self.op = ""
        self._nodes: dict[tuple[int, ...], int] = {}
        self._met: set[bytes] = set()
        self._colour = 0

    def new(self, shape: Iterable[int]) -> Tensor:
        """New coordinates, each a class of its own."""
        shape = tuple(shape)
        n, first = int(np.prod(shape, dtype=np.int64)), len(self.parent)
        self.parent += range(first, first + n)
        self.scale_parent += range(first, first + n)
        self.scale_sign += [1] * n
        self.marks += [0] * n
        return torch.arange(first, first + n).reshape(shape)

    # ---- classes and scales

    def root(self, a: int) -> int:
        """The class of a coordinate."""
        parent = self.parent
        while parent[a] != a:
            parent[a] = parent[parent[a]]
            a = parent[a]
        return a

    def scale(self, a: int) -> tuple[int, int]:
        """(root, sign): the scale of ``a`` is that of the root, to the power of the sign."""
        path, r = [], a
        while self.scale_parent[r] != r:
            path.append(r)
            r = self.scale_parent[r]
        sign = 1
        for x in reversed(path):
            sign *= self.scale_sign[x]
            self.scale_parent[x], self.scale_sign[x] = r, sign
        return r, sign

    def merge(self, a: int, b: int) -> None:
        """The same coordinate; nothing is said of scales."""
        self.parent[self.root(a)] = self.root(b)

    def relate(self, a: int, b: int, sign: int) -> None:
        """The same coordinate, with log scale[a] = sign × log scale[b]: -1 says dual."""
        self.merge(a, b)
        (ra, sa), (rb, sb) = self.scale(a), self.scale(b)
        if ra == rb:
            if sa != sign * sb and ra not in self.units:
                self.equations.append(({ra: 2}, "both"))
                self.marks[ra] |= Mark.SELF
            return
        self.scale_parent[ra], self.scale_sign[ra] = rb, sa * sign * sb
        if ra in self.units:
            self.units.add(rb)

    def same(self, f: Tensor, g: Tensor) -> None:
        """Two fields hold the same coordinates, place by place."""
        pairs = self.pairs(f, g)
        self.met([(a, b) for a, b in pairs if a != b])
        for a, b in pairs:
            self.relate(a, b, 1)

    def same_scale(self, f: Tensor, g: Tensor) -> None:
        """Two fields hold coordinates of one scale, place by place."""
        for a, b in self.pairs(f, g):
            (ra, sa), (rb, sb) = self.scale(a), self.scale(b)
            if ra != rb:
                self.equations.append(({ra: sa, rb: -sb}, "both"))
            elif sa != sb:
                self.equations.append(({ra: 2}, "both"))

    def equate(self, total: Iterable[tuple[int, int]]) -> None:
        """Σ exponent × log scale[id] = 0, and the same for signs."""
        equation: dict[int, int] = {}
        for a, exponent in total:
            r, sign = self.scale(a)
            equation[r] = equation.get(r, 0) + sign * exponent
        self.equations.append((equation, "both"))

    def fixed(self, a: int) -> bool:
        """Whether an id's scale is known to be 1."""
        return a < 0 or self.scale(a)[0] in self.units

    def fix(self, ids: Tensor, domain: Domain = "both") -> None:
        """Scales are 1 (both), positive (sign) or signs (log)."""
        for a in unique_list(ids):
            r = self.scale(a)[0]
            if r not in self.units:
                if domain == "both":
                    self.units.add(r)
                self.equations.append(({r: 1}, domain))

    # ---- marks, colours, sets

    def mark(self, ids: Tensor, marks: int) -> None:
        for a in unique_list(ids):
            self.marks[a] |= marks

    def marked(self, a: int, mark: int) -> bool:
        return bool(self.marks[a] & mark)

    def freeze(self, ids: Tensor) -> None:
        """Nothing that holds these coordinates may be changed."""
        self.frozen_by[self.op] = self.frozen_by.get(self.op, 0) + len(unique_list(ids))
        self.fix(ids)
        self.mark(ids, Mark.FROZEN | Mark.NO_MIX)

    def contracted_with_itself(self, ids: Tensor) -> None:
        """A sum of squares: orthogonal changes, scales of ±1."""
        for a in unique_list(ids):
            if not self.fixed(a):
                self.equations.append(({self.scale(a)[0]: 2}, "both"))
        self.mark(ids, Mark.SELF)

    def seen(self, ids: Tensor) -> None:
        """One op saw these coordinates at once."""
        u = np.asarray(unique_list(ids), np.int64)
        if len(u):
            self.sets.setdefault(hashlib.md5(u.tobytes()).digest(), u)

    def colour(self, ids: Tensor, values: Tensor) -> None:
        """Coordinates that meet different constants are told apart."""
        self._colour += 1
        ids, values = cores(ids, values)
        flat, value = ids.reshape(-1), values.reshape(-1).double()
        order = torch.argsort(flat, stable=True)
        u, counts = torch.unique_consecutive(flat[order], return_counts=True)
        for a, v in zip(u.tolist(), torch.split(value[order], counts.tolist()), strict=True):
            if (
                a >= 0
            ):  # met once, or along many tokens: what counts is which values came in which order
                rounded = torch.unique_consecutive(torch.round(v * 1e9) / 1e9)
                self.paint(a, (self._colour, hashlib.md5(rounded.numpy().tobytes()).hexdigest()))

    def paint(self, a: int, colour: tuple) -> None:
        self.colours.setdefault(a, set()).add(colour)

    # ---- who met whom

    def pairs(self, f: Tensor, g: Tensor) -> list[tuple[int, int]]:
        return [(a, b) for a, b in unique_pairs(f, g)[0].tolist() if a >= 0 and b >= 0]

    def met(self, pairs: Iterable[tuple[int, int]]) -> None:
        p = np.asarray(list(pairs), np.int64).reshape(-1, 2)
        p = p[(p >= 0).all(1)]
        key = hashlib.md5(self.op.encode() + p.tobytes()).digest()
        if (
            len(p) and key not in self._met
        ):  # another pass over another expert says nothing new of this one
            self._met.add(key)
            self.meetings.append((self.op, p))

    def node(self, fibre: Iterable[int]) -> int:
        """What is left of a fibre when an op has gone over it: one number above its coordinates."""
        key = tuple(fibre)
        if key not in self._nodes:
            n = self.new((1,))
            self.fix(n)
            self.mark(n, Mark.NO_MIX | Mark.NODE)
            self._nodes[key] = int(n)
            self.link(int(n), [a for a in key if a >= 0])
        return self._nodes[key]

    def link(self, node: int, ids: Iterable[int]) -> None:
        """``ids``, in this order, lie below a node."""
        ids, have = list(ids), self.children.setdefault(node, [])
        if ids not in have:
            have.append(ids)
