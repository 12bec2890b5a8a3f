"""From a trace to what may be changed: classes, blocks and their groups, scales and signs, swaps, gains.

``derive`` takes any model and examples of its inputs; what it proposes holds where the certificate says so.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .arrays import line, unique_list
from .block import Axis, Block, Kind
from .ids import Ids, Mark
from .record import Fold, Record
from .routers import link_experts
from .scales import Scales, solve
from .swaps import Swaps
from .trace import Example, Refill, trace, unseen


class Place(NamedTuple):
    """Where an id stands: a weight, its axis, and the id itself."""

    name: str
    dim: int
    id: int


@dataclass(frozen=True, eq=False)
class ScaleRoots:
    """An axis's ids as roots of scales: ``unique[at[i]]`` to the power of ``power[i]``."""

    unique: list[int]
    at: np.ndarray
    power: np.ndarray


@dataclass(frozen=True, eq=False)
class Derived:
    """All that one trace says of a model's weights.

    axes: the coordinate id of every element along an axis, as an array of the weight's shape; an axis of a stack of
        matrices has other ids at every place of the stack. ``lines`` gives them row by row.
    blocks: what may be changed, by which group. A class is in at most one block that is not of NODES.
    gains: weights that multiply coordinates, each with the constant that is added to it (1 for Gemma's 1 + w).
    unfolded: gains that something else than a linear reader sees, so that they stay.
    folds: id of a reader's or bias's coordinate -> the element of a gain that moves into it.
    scales: what the equations leave of scales and signs; a coordinate's is that of ``ids.scale(id)``.
    contracted: ids that something was contracted with: of a weight's, those of its readers.
    unseen: weights of which the examples prove nothing. unknown: ops that no rule understands. frozen_by: op -> ids.
    """

    ids: Ids
    axes: Mapping[Axis, Tensor]
    shapes: Mapping[str, tuple[int, ...]]
    blocks: tuple[Block, ...]
    gains: Mapping[str, float]
    unfolded: frozenset[str]
    folds: Mapping[int, Fold]
    scales: Scales
    places: Mapping[int, tuple[Place, ...]]
    contracted: frozenset[int]
    unseen: tuple[str, ...]
    unknown: Mapping[str, int]
    frozen_by: Mapping[str, int]

    def line(self, axis: Axis) -> list[int]:
        """The ids along an axis; for a stack, place by place."""
        return line(self.axes[axis]).tolist()

    @cached_property
    def scale_roots(self) -> Mapping[Axis, ScaleRoots]:
        """Per axis, whose scale each position has."""
        out = {}
        for axis in self.axes:
            ids = self.line(axis)
            roots, powers = zip(*map(self.ids.scale, ids), strict=True)
            unique, at = np.unique(np.array(roots), return_inverse=True)
            out[axis] = ScaleRoots(unique.tolist(), at, np.array(powers))
        return out

    @cached_property
    def folded_rows(self) -> Mapping[Axis, list[tuple[str, int, Tensor, Tensor]]]:
        """Per axis, (gain, power, positions, the gain's elements there)."""
        out = {}
        for axis in self.axes:
            found: dict[tuple[str, int], list[tuple[int, int]]] = defaultdict(list)
            for position, a in enumerate(self.line(axis)):
                into = self.folds.get(a)
                if into is not None and into.name not in self.unfolded:
                    found[(into.name, into.power)].append((position, into.index))
            if found:
                out[axis] = [(*key, *torch.tensor(pairs).T) for key, pairs in found.items()]
        return out

    def is_gain(self, a: int) -> bool:
        return self.ids.marked(a, Mark.GAIN)

    def is_stack_place(self, a: int) -> bool:
        return self.ids.marked(a, Mark.LEAD)

    def variance(self, block: Block, a: int) -> int:
        """1 where an id changes as the block's first axis does, -1 where it is its dual."""
        first = min(block.where)
        own = self.places[self.ids.root(a)]
        reference = next((p.id for p in own if (p.name, p.dim) == first), own[0].id)
        return self.ids.scale(a)[1] * self.ids.scale(reference)[1]


def derive(model: nn.Module, examples: Sequence[Example], refill: Refill | None = None) -> Derived:
    """The groups of a model in float64, from passes over examples.

    Only the first example is used where it reaches all weights; others go through the model with other weights (from
    ``refill(model, seed)``, else random ones that are taken back afterwards) until all have been reached.
    """
    record = trace(model, examples, refill)
    return Analysis(record, unseen(model, record)).result()


_LAYER = re.compile(r"\.(\d+)\.")


def layer_of(name: str) -> int | None:
    """The first number in a weight's name."""
    found = _LAYER.search(name)
    return int(found[1]) if found else None


class Analysis:
    """Classes of ids, with all that was seen of them."""

    def __init__(self, record: Record, unseen: tuple[str, ...]) -> None:
        self.r, self.ids, self.unseen = record, record.ids, unseen
        self.experts = link_experts(record)
        self.unfolded = frozenset(record.broken)
        self.axes = dict(self._axes())
        self.places, self.order = self._places()
        self.marks = self._marks()
        self.colours: dict[int, set[tuple]] = defaultdict(set)
        for a, c in self.ids.colours.items():
            self.colours[self.ids.root(a)] |= c
        self.member = self._member()

    def _axes(self) -> Iterable[tuple[Axis, Tensor]]:
        for name, label in self.r.weights.items():
            for f in label.fields:
                dim = max(d for d in range(f.dim()) if f.stride(d) != 0 and f.shape[d] > 1)
                yield (name, dim), f

    def _places(self) -> tuple[dict[int, tuple[Place, ...]], dict[int, int]]:
        places: dict[int, list[Place]] = defaultdict(list)
        order: dict[int, int] = {}
        for (name, dim), f in self.axes.items():
            for a in unique_list(f):
                root = self.ids.root(a)
                places[root].append(Place(name, dim, a))
                order.setdefault(root, len(order))
        return {c: tuple(p) for c, p in places.items()}, order

    def _marks(self) -> dict[int, int]:
        """Marks of whole classes; what a gain that stays multiplies cannot mix."""
        marks: dict[int, int] = defaultdict(int)
        for a, m in enumerate(self.ids.marks):
            if m:
                marks[self.ids.root(a)] |= m
        for name in self.unfolded:
            for f in self.r.weights[name].fields:
                for a in unique_list(f):
                    if self.ids.marked(a, Mark.GAIN):
                        marks[self.ids.root(a)] |= Mark.NO_MIX
        return marks

    def _member(self) -> dict[int, frozenset[int]]:
        """Per class, the numbers of the sets that it was seen in."""
        sets = {frozenset(map(self.ids.root, s.tolist())) for s in self.ids.sets.values()}
        member: dict[int, set[int]] = defaultdict(set)
        for n, s in enumerate(sets):
            for c in s:
                member[c].add(n)
        return {c: frozenset(s) for c, s in member.items()}

    # ---- blocks

    def result(self) -> Derived:
        r = self.r
        pairs = self.pairs()
        paired = {c for b in pairs for c in b.classes}
        blocks = (*pairs, *self.same_company(paired), *self.swaps())
        carried = [
            a
            for f in self.axes.values()
            for a in unique_list(f)
            if self.member.get(self.ids.root(a))
        ]
        return Derived(
            ids=self.ids,
            axes=self.axes,
            shapes={
                n: tuple(label.fields[0].shape) for n, label in r.weights.items() if label.fields
            },
            blocks=blocks,
            gains={g.name: g.offset for g in r.gains.values()},
            unfolded=self.unfolded,
            folds=r.folds,
            scales=solve(self.ids, carried),
            places=self.places,
            contracted=frozenset(r.contracted),
            unseen=self.unseen,
            unknown=dict(r.unknown),
            frozen_by=dict(self.ids.frozen_by),
        )

    def block(
        self, kind: Kind, classes: Sequence[int], where: Iterable[Axis], maps: tuple = ()
    ) -> Block:
        where = frozenset(where)
        layers = {layer_of(name) for name, _ in where}
        many = len(layers) > 1
        if kind is Kind.NODES:
            stem = (
                "experts"
                if any(self.ids.marked(a, Mark.LEAD) for m in maps for a in m)
                else "heads"
            )
        elif kind in (Kind.O, Kind.O1):
            stem = "residual" if many else "inner"
        elif kind is Kind.C:
            stem = "qk"
        elif kind is Kind.GL:
            stem = "qk" if any(self.marks[c] & Mark.ACTIVATION for c in classes) else "vo"
        else:
            stem = "residual" if many else "ch"
        numbers = layers - {None}
        layer = next(iter(numbers)) if len(numbers) == 1 and stem != "residual" else None
        return Block(kind, tuple(classes), where, stem, layer, maps)

    def where(self, classes: Iterable[int]) -> set[Axis]:
        return {(p.name, p.dim) for c in classes for p in self.places.get(c, ())}

    def pairs(self) -> list[Block]:
        """Pairs that rotary positions turn: complex scales, unless something else touches one of the two."""
        partner: dict[int, int] = {}
        clash: set[int] = set()
        for a, b in self.r.turned:
            a, b = self.ids.root(a), self.ids.root(b)
            if a == b or partner.get(a, b) != b or partner.get(b) == a:
                clash |= {a, b}
            partner[a] = b
        alike = Mark.NO_MIX | Mark.FROZEN | Mark.SELF | Mark.ONES
        out = []
        for a, b in partner.items():
            free = a in self.places and not {a, b} & clash
            free = free and not (self.marks[a] | self.marks[b]) & alike
            free = free and self.company(a) == self.company(b)
            if free and self.one_scale(a) and self.one_scale(b):
                out.append(self.block(Kind.C, (a, b), self.where((a, b))))
        return out

    def company(self, c: int) -> tuple[frozenset[int], frozenset[tuple]]:
        """The sets and colours of a class, but for those that turns gave it."""
        return self.member.get(c, frozenset()), frozenset(
            x for x in self.colours[c] if x[0] != "turned"
        )

    def one_scale(self, c: int) -> bool:
        """Whether all weights that carry a class scale with it, or inversely: only then can it mix."""
        raw = [p.id for p in self.places.get(c, ()) if not self.ids.marked(p.id, Mark.GAIN)]
        return len({self.ids.scale(a)[0] for a in raw}) <= 1 and not any(map(self.ids.fixed, raw))

    def same_company(self, paired: set[int]) -> list[Block]:
        """Classes that every op saw together, of one kind and colour. One that a single weight carries, once, was met by
        nothing that could undo a change: what was traced multiplies it by zeros."""
        nodes = {self.ids.root(g) for g in self.ids.children}
        groups: dict[tuple, list[int]] = defaultdict(list)
        for c, places in self.places.items():
            marks = self.marks[c]
            if (
                len(places) < 2
                or c in paired
                or c in nodes
                or marks & Mark.FROZEN
                or not self.member.get(c)
            ):
                continue
            kind = self.kind(c, marks)
            key = (
                kind,
                self.member[c],
                frozenset(self.colours[c]),
                marks & (Mark.SELF | Mark.ONES),
            )
            groups[key].append(c)
        return [
            self.block(kind, sorted(cs, key=self.order.__getitem__), self.where(cs))
            for (kind, *_), cs in groups.items()
            if len(cs) > 1 or kind is Kind.GL
        ]

    def kind(self, c: int, marks: int) -> Kind:
        if marks & Mark.NO_MIX or (marks & Mark.ONES and not marks & Mark.SELF):
            return Kind.PERM
        if marks & Mark.SELF:
            return Kind.O1 if marks & Mark.ONES else Kind.O
        return Kind.GL if self.one_scale(c) else Kind.PERM

    def swaps(self) -> list[Block]:
        """Heads and experts that can change places."""
        position = {p.id: (p.name, p.dim) for places in self.places.values() for p in places}

        def closed(swap: Mapping[int, int]) -> bool:
            return all(position.get(a) == position.get(b) for a, b in swap.items())

        graph = Swaps(self.ids, lambda a: bool(self.marks[self.ids.root(a)] & Mark.FROZEN))
        out = []
        for nodes, maps in graph.groups(self.experts, position, closed):
            where = {position[a] for m in maps for a in m if a in position}
            out.append(self.block(Kind.NODES, nodes, where, tuple(maps)))
        return out
