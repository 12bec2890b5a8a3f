"""Layout: which axis of which weight lies in which space, and what widths cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase
from functools import cached_property
from math import prod

from ..core.kind import Kind, space_name
from ..core.space import Space
from .architecture import Architecture

KINDS = tuple(kind for kind in Kind if kind not in (Kind.EDGE, Kind.EXPERTS))  # all families' ways


class Role(Enum):
    """How a weight's axis meets its space, and so what a Change does to it."""

    WRITE = "writes"  # contracted with encode
    READ = "reads"  # contracted with decode
    GATE = "gates"  # contracted with the pattern of encode, scales and signs pass it by: gates, gains of norms


@dataclass(frozen=True)
class Axis:
    """One axis of a weight: ``heads`` runs of the space's dim; with more heads than copies, neighbours share one.

    ``outer`` is the same axis as one of the space whose directions are the runs, neighbours making one direction.
    """

    space: str
    role: Role
    heads: int = 1
    outer: Axis | None = None

    @property
    def spaces(self) -> tuple[Axis, ...]:
        """The axis as one of each space that it lies in."""
        return (self,) if self.outer is None else (self, self.outer)


@dataclass(frozen=True)
class Edge:
    """The residual edge across one stage, from one point of the stream to the next; ``post`` where a norm stands behind
    the stage's branch."""

    stage: str
    source: str
    target: str
    block: int  # the number of the block that the stage lies in
    number: int  # of the stage in its block
    leaves: bool = False  # whether the block ends behind the stage
    post: bool = False

    @property
    def written(self) -> str:
        """Where the stage's branches write, by name: the next point of the stream, or in front of the norm behind them."""
        return f"y.{self.block}.{self.number}" if self.post else self.target

    @property
    def entry(self) -> str:
        """The point of the stream where the block begins."""
        return space_name(Kind.RESIDUAL, self.block, 0)


@dataclass(frozen=True)
class Parameters:
    """Stored parameters; a tied tensor counts once, where it lies first."""

    embedding: int = 0
    blocks: int = 0
    shortcuts: int = 0
    head: int = 0

    @property
    def total(self) -> int:
        return self.embedding + self.blocks + self.shortcuts + self.head

    def to_dict(self) -> dict[str, int]:
        return {"total": self.total, **self.__dict__}


@dataclass(frozen=True)
class Layout:
    """Spaces, labelled weight axes and residual edges of one model, all by name."""

    architecture: Architecture
    spaces: Mapping[str, Space]
    axes: Mapping[str, tuple[Axis | None, ...]]
    shapes: Mapping[str, tuple[int, ...]]
    edges: tuple[Edge, ...]
    branches: Mapping[str, str]  # a branch of a stage → the space that it vanishes with
    windows: Mapping[
        str, int | None
    ]  # an attention's space of KV groups, in order → how far back it sees
    shortcuts: frozenset[str]  # stages that carry one already
    ranks: Mapping[str, int]  # points of the stream that a shortcut of low rank leads to → its rank
    tied: bool
    centred: bool
    folded: bool

    @property
    def points(self) -> list[str]:
        """The points of the residual stream, in order; the last one is before the final norm."""
        return [e.source for e in self.edges] + [self.edges[-1].target]

    @property
    def depth(self) -> int:
        """How many stages a token passes."""
        return len(self.edges)

    def select(self, patterns: Iterable[str]) -> list[str]:
        """The names of the spaces that any of the patterns means: a kind, a name, or a glob on names."""
        patterns = list(patterns)
        return [
            n
            for n, s in self.spaces.items()
            if any(p == s.kind or fnmatchcase(n, p) for p in patterns)
        ]

    @property
    def matrices(self) -> dict[str, str]:
        """The spaces that matrices of branches would have inside as two factors → those linear layers' paths."""
        found = [
            (space_name(Kind.EDGE, e.block, part=path.rpartition(".")[2]), path)
            for e in self.edges
            for name, axes in self.axes.items()
            if name.startswith(f"{e.stage}.") and name.endswith(".weight") and len(axes) == 2
            if not any(a is not None and self.spaces[a.space].kind == Kind.EDGE for a in axes)
            for path in (name.removesuffix(".weight"),)
        ]
        return dict(found)

    def splits(self, patterns: Iterable[str]) -> frozenset[str]:
        """Which of ``matrices`` the patterns mean: all, by the kind `edge`, or by names and globs that begin so."""
        edges = [p for p in patterns if p.partition(".")[0] == Kind.EDGE]
        asked = [f"{p}.*" if p == Kind.EDGE else p for p in edges]
        return frozenset(n for n in self.matrices if any(fnmatchcase(n, p) for p in asked))

    def inside(self, edge: Edge) -> list[str]:
        """The spaces that lie inside a stage."""
        return [
            n
            for n, s in self.spaces.items()
            if (s.block, s.stage) == (edge.block, edge.number) and s.kind != Kind.RESIDUAL
        ]

    def attention(self, space: str) -> str:
        """The path of the attention whose queries and keys a space holds."""
        ends = (".k.weight", ".k.second.weight")
        name = next(
            n for n, (a, *_) in self.axes.items() if n.endswith(ends) and a and a.space == space
        )
        return name[: name.rindex(".k.")]

    def readers(self, space: str) -> list[tuple[str, int]]:
        """The weights (name, axis) that read a space."""
        return [
            (name, i)
            for name, axes in self.axes.items()
            for i, axis in enumerate(axes)
            for a in (axis.spaces if axis is not None else ())
            if a.space == space and a.role is Role.READ and len(axes) > 1
        ]

    def width(self, space: str, widths: Mapping[str, int]) -> int:
        """The width of a space in a choice of widths, which leaves out those that keep theirs."""
        k = widths.get(space)
        return self.spaces[space].dim if k is None else k

    def widths(self, now: Layout) -> dict[str, int]:
        """The widths of this model's spaces in a later layout of it, 0 where their branch is gone; that of a space inside
        a matrix is the whole one where the matrix is stored as one again."""
        whole = now.matrices
        return {
            n: now.spaces[n].dim if n in now.spaces else s.dim if n in whole else 0
            for n, s in self.spaces.items()
        }

    def blocks(self, widths: Mapping[str, int]) -> list[int]:
        """The numbers of the blocks that still have a branch."""
        left = self.stages(widths)
        return sorted({e.block for e in self.edges if e.stage in left})

    def stages(self, widths: Mapping[str, int]) -> list[str]:
        """The stages that still have a branch."""
        left = {
            b.rpartition(".")[0] for b, space in self.branches.items() if self.width(space, widths)
        }
        return [e.stage for e in self.edges if e.stage in left]

    def counting(self, widths: Mapping[str, int]) -> list[str]:
        """The attentions left that fill the first slot of a cache, where it counts its tokens: those of its window."""
        first = next(iter(self.windows.values()), None)
        return [
            n for n, window in self.windows.items() if window == first and self.width(n, widths)
        ]

    def gone(self, widths: Mapping[str, int]) -> tuple[str, ...]:
        """How the names of weights begin that go: branches of width 0, and the norms of stages with no other."""
        lost = [f"{b}." for b, space in self.branches.items() if not self.width(space, widths)]
        left = self.stages(widths) if lost else ()
        dead = [e.stage for e in self.edges if lost and e.stage not in left]
        return (*lost, *(f"{stage}.{norm}." for stage in dead for norm in ("norm", "post")))

    def length(self, axis: Axis, widths: Mapping[str, int]) -> int:
        """How long an axis is: its runs, fewer where their groups are fewer, times the width of each."""
        runs = axis.heads
        if axis.outer is not None:
            groups = self.spaces[axis.outer.space].dim
            runs = runs // groups * self.width(axis.outer.space, widths)
        return runs * self.width(axis.space, widths)

    @cached_property
    def _factors(self) -> dict[str, tuple[int, tuple[str, ...]]]:
        """Weight → its size where each space that it lies on had one direction, a KV group for one, and those spaces."""
        found = {}
        for name, axes in self.axes.items():
            labelled = [a for a in axes if a is not None]
            size = prod(n for n, a in zip(self.shapes[name], axes, strict=True) if a is None)
            size *= prod(
                a.heads // (self.spaces[a.outer.space].dim if a.outer else 1) for a in labelled
            )
            found[name] = size, tuple(part.space for a in labelled for part in a.spaces)
        return found

    def _sizes(self, widths: Mapping[str, int]) -> dict[str, int]:
        """Weight → how many numbers it stores; those that go are left out."""
        gone = self.gone(widths)
        dims = {n: space.dim for n, space in self.spaces.items()} | {**widths}
        sizes = {}
        for name, (size, spaces) in self._factors.items():
            if gone and name.startswith(gone):
                continue
            for space in spaces:
                size *= dims[space]
            sizes[name] = size
        for first, second, rank in self._pairs:
            if first in sizes and (k := self.width(rank, widths)):
                whole = sizes[first] * sizes[second] // k**2
                if whole <= sizes[first] + sizes[second]:  # is stored as one matrix then
                    sizes[first], sizes[second] = 0, whole
        return sizes

    @cached_property
    def _pairs(self) -> list[tuple[str, str, str]]:
        """The weights of two factors of one matrix each, and the space between them."""
        return [
            (name, name.removesuffix("first.weight") + "second.weight", axes[0].space)
            for name, axes in self.axes.items()
            if name.endswith(".first.weight") and axes[0] is not None
        ]

    def factored(self, widths: Mapping[str, int]) -> list[str]:
        """The spaces inside matrices that are stored as two factors, since those are smaller."""
        sizes = self._sizes(widths)
        return [rank for first, _, rank in self._pairs if sizes.get(first)]

    def written_behind(self, space: str) -> list[str]:
        """Where what reads a space writes to the stream (``Edge.written``); a point itself. None for queries, keys and
        all else that is not added to the stream at once."""
        if self.spaces[space].kind == Kind.RESIDUAL:
            return [space]
        found: list[str] = []
        for name, i in self.readers(space):
            for j, a in enumerate(self.axes[name]):
                if j == i or a is None or a.role is not Role.WRITE:
                    continue
                if self.spaces[a.space].kind == Kind.RESIDUAL:
                    found.append(
                        next(e.written for e in self.edges if name.startswith(f"{e.stage}."))
                    )
                elif self.spaces[a.space].kind == Kind.EDGE:
                    found += self.written_behind(a.space)
        return found

    def missing_biases(
        self, space: str, widths: Mapping[str, int] | None = None
    ) -> dict[str, tuple[Axis | None, ...]]:
        """The biases that the readers of a space could have and have not, with the labels that they would get: as they
        are, or at ``widths``, where two factors may be one matrix again, whose bias is the second's."""
        names = [name for name, _ in self.readers(space)]
        if widths is not None:
            sizes = self._sizes(widths)
            names = [n.replace(".first.", ".second.") if sizes.get(n) == 0 else n for n in names]
        found = {name.removesuffix("weight") + "bias": self.axes[name][:1] for name in names}
        return {bias: axes for bias, axes in found.items() if bias not in self.axes}

    def added_biases(self, before: Layout) -> list[str]:
        """The biases that linear layers have got since an earlier layout of the model."""
        whole = {
            n.replace(".second.bias", ".bias") for n in before.shapes
        }  # of matrices that are one again
        return sorted(
            n for n in self.shapes.keys() - before.shapes.keys() - whole if n.endswith(".bias")
        )

    @cached_property
    def parts(self) -> dict[str, str]:
        """Weight → which of Parameters' fields it counts towards."""
        return {name: self._part(name) for name in self.axes}

    def _part(self, name: str) -> str:
        if name.startswith(tuple(f"{e}." for e in self.architecture.embed)):
            return "embedding"
        if name.startswith(self.architecture.blocks + "."):
            return "shortcuts" if name.endswith(".shortcut") else "blocks"
        return "head"

    def parameters(
        self,
        widths: Mapping[str, int],
        segments: Mapping[str, object] | None = None,
        ranks: Mapping[str, int] | None = None,
    ) -> Parameters:
        """What a choice of widths stores. ``segments``: which points of the stream share a basis, by equal values;
        ``ranks``: points that a shortcut of low rank leads to from another basis."""
        count = dict.fromkeys(("embedding", "blocks", "shortcuts", "head"), 0)
        for name, size in self._sizes(widths).items():
            part = self.parts[name]
            if part != "shortcuts":
                count[part] += size
        found = self.shortcut_ranks(segments, ranks)
        count["shortcuts"] = sum(prod(self._shortcut(e, r, widths)) for e, r in found.items())
        return Parameters(**count)

    def shortcut_ranks(
        self, segments: Mapping[str, object] | None = None, ranks: Mapping[str, int] | None = None
    ) -> dict[Edge, int | None]:
        """The residual edges that carry a shortcut → its rank where that is low: edges that have one, and those where
        two bases meet."""
        segments, ranks = segments or {}, ranks or {}
        meet = {e: segments.get(e.source) != segments.get(e.target) for e in self.edges}
        found = {e: (ranks if meet[e] else self.ranks).get(e.target) for e in self.edges}
        return {e: r for e, r in found.items() if (meet[e] or e.stage in self.shortcuts) and r != 0}

    def _shortcut(self, edge: Edge, rank: int | None, widths: Mapping[str, int]) -> tuple[int, int]:
        """The shape of a shortcut's tensor."""
        source, target = (self.width(p, widths) for p in (edge.source, edge.target))
        return source, target if rank is None else rank

    def shortcut_products(
        self,
        widths: Mapping[str, int],
        segments: Mapping[str, object] | None = None,
        ranks: Mapping[str, int] | None = None,
    ) -> int:
        """How many products shortcuts take per token: F of I − F Fᵀ multiplies twice."""
        found = self.shortcut_ranks(segments, ranks)
        return sum(
            (1 if r is None else 2) * prod(self._shortcut(e, r, widths)) for e, r in found.items()
        )

    def flops(
        self,
        widths: Mapping[str, int],
        segments: Mapping[str, object] | None = None,
        ranks: Mapping[str, int] | None = None,
    ) -> int:
        """Per token: two for every entry of a matrix that multiplies it; attention scores and norms are left out."""
        sizes = self._sizes(widths)
        matrices = sum(
            size
            for name, size in sizes.items()
            if len(self.axes[name]) == 2 and self.parts[name] in ("blocks", "head")
        )
        if self.tied:
            matrices += sizes[f"{self.architecture.embed[0]}.weight"]
        return 2 * (matrices + self.shortcut_products(widths, segments, ranks))

    def split_products(self, branch: str, widths: Mapping[str, int]) -> float:
        """How many products a branch's matrices take where some are two factors, relative to all of them whole."""
        if not self._pairs:
            return 1.0
        whole = {**widths, **{rank: self.spaces[rank].dim for *_, rank in self._pairs}}
        now, before = (
            sum(
                n
                for name, n in self._sizes(at).items()
                if name.startswith(f"{branch}.") and len(self.axes[name]) == 2
            )
            for at in (widths, whole)
        )
        return now / before

    @property
    def head_flops(self) -> int:
        """Per token: what the matrix costs that makes logits, which generation asks for the last token only."""
        name = f"{self.architecture.embed[0] if self.tied else self.architecture.head}.weight"
        return 2 * prod(self.shapes[name])

    def kv_entries(self, widths: Mapping[str, int]) -> int:
        """How many numbers a cache holds per token: keys and values of every layer."""
        gone = self.gone(widths)
        return sum(
            self.length(a, widths)
            for name, axes in self.axes.items()
            for a in axes
            if a is not None and a.outer is not None and a.role is Role.WRITE and len(axes) == 2
            if not name.startswith(gone)
        )
