"""The structure of a model: which axis of which weight lies in which space, which stage writes where."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ..core.kind import Kind, space_name
from ..core.space import Space
from .architecture import Architecture
from .axes import Axis, Edge, Role


@dataclass(frozen=True)
class Structure:
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

    def widths(self, now: Structure) -> dict[str, int]:
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

    def added_biases(self, before: Structure) -> list[str]:
        """The biases that linear layers have got since an earlier layout of the model."""
        whole = {
            n.replace(".second.bias", ".bias") for n in before.shapes
        }  # of matrices that are one again
        return sorted(
            n for n in self.shapes.keys() - before.shapes.keys() - whole if n.endswith(".bias")
        )
