"""Layout: the structure of a model, and what choices of its widths cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

from .axes import Axis, Edge, Role
from .structure import Structure


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
class Layout(Structure):
    """The structure of one model, and what it stores and multiplies at a choice of widths."""

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
            matrices += sum(n for name, n in sizes.items() if self._in_table(name))
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

    def _in_table(self, name: str) -> bool:
        """Whether a weight is part of the table that ids are looked up in."""
        return name.startswith(f"{self.architecture.embed[0]}.")

    @property
    def head_flops(self) -> int:
        """Per token: what the matrix costs that makes logits, which generation asks for the last token only."""
        if self.tied:
            return 2 * sum(prod(s) for name, s in self.shapes.items() if self._in_table(name))
        head = f"{self.architecture.head}."
        return 2 * sum(prod(s) for n, s in self.shapes.items() if n.startswith(head) and len(s) > 1)

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
