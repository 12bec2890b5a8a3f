"""The spaces of a derived layout that a recipe can cut, and what widths of them store."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import numpy as np
from transformers import PretrainedConfig, PreTrainedModel

from ...calibrate.tap import Found, places
from ...core.group import Group
from ...core.kind import Kind
from ...core.space import Space
from ...model.described import description as d
from ...model.described.elements import blocks
from ...model.described.pattern import RIGID, expand
from ...model.described.weightless import on_meta
from ...model.layout import Parameters
from ...model.narrow.experts import chosen
from ...model.narrow.kinds import channels, experts, heads, stream, values
from .heads import Groups, codes_of, head_places

STREAM = "x"
Widths = Mapping[str, int]


@dataclass(frozen=True)
class Cost:
    """One stored parameter: its size, what it counts towards, and of each label of each axis how many positions which space has."""

    size: int
    part: str
    axes: tuple[tuple[int, Mapping[str, int]], ...]


@dataclass(frozen=True)
class DerivedLayout:
    """What a plan reads of a layout. ``own``: the layout's name of each space by the name that recipes use."""

    description: d.Description = field(repr=False)
    spaces: Mapping[str, Space]
    own: Mapping[str, str]
    costs: tuple[Cost, ...] = field(repr=False)
    tied: int  # numbers of a head that is the table of tokens too
    model: PreTrainedModel = field(repr=False)  # on meta

    groups: Mapping[str, Groups] = field(default_factory=dict)  # of heads: what goes together
    branches: Mapping[str, str] = field(default_factory=dict)  # none vanishes
    windows: Mapping[str, int | None] = field(default_factory=dict)

    @property
    def stream(self) -> d.Space | None:
        """The one global space of the stream."""
        return stream(self.description.flat())

    def counting(self, widths: Widths) -> list[str]:
        """No attention goes, so none has to stay."""
        return []

    def factored(self, widths: Widths) -> list[str]:
        """No matrix becomes two."""
        return []

    def select(self, patterns: Iterable[str]) -> list[str]:
        """The names of the spaces that any of the patterns means: a kind, a name, or a glob on names."""
        wanted = list(patterns)
        return [
            n
            for n, s in self.spaces.items()
            if any(p == s.kind or fnmatchcase(n, p) for p in wanted)
        ]

    def kept(self, widths: Widths) -> dict[str, np.ndarray]:
        """For shapes alone: of each narrower space its first coordinates, by the layout's names."""
        return {
            self.own[n]: self.codes(n, np.tile(np.arange(k), (self.spaces[n].copies, 1)))
            for n, k in widths.items()
            if k < self.spaces[n].dim
        }

    def codes(self, name: str, keep: np.ndarray) -> np.ndarray:
        """The layout's coordinates that stay of a space, where each copy keeps those at ``keep``."""
        return codes_of(self.description.flat(), self.own[name], self.groups.get(name), keep)

    def places(self, name: str) -> Iterator[Found]:
        """Where a space lies on the matrices that carry it; of heads, on those that read what they give."""
        flat, own = self.description.flat(), self.own[name]
        groups = self.groups.get(name)
        return places(flat, own) if groups is None else head_places(flat, own, groups)

    def parameters(self, widths: Widths, untied: bool = False) -> Parameters:
        """What a choice of widths stores; a head that is turned apart from the table counts for itself."""
        count = dict.fromkeys(("embedding", "blocks", "head"), 0)
        for cost in self.costs:
            count[cost.part] += self._size(cost, widths)
        if self.tied and untied:
            k = widths.get(STREAM)
            whole = self.spaces[STREAM].dim
            count["head"] += self.tied if k is None else self.tied // whole * k
        return Parameters(**count)

    def _size(self, cost: Cost, widths: Widths) -> int:
        size = cost.size
        for total, where in cost.axes:
            gone = sum(
                n * (self.spaces[s].dim - widths[s]) // self.spaces[s].dim
                for s, n in where.items()
                if s in widths
            )
            size = size * (total - gone) // total
        return size

    def flops(self, widths: Widths) -> None:
        """Not counted: which weights a token meets is not in the layout."""

    def kv_entries(self, widths: Widths) -> None:
        """Not counted."""


def derived_spaces(config: PretrainedConfig, description: d.Description) -> DerivedLayout:
    """The stream, channels behind which a matrix writes the stream, whole experts, whole heads, values."""
    flat = description.flat()
    found: dict[str, tuple[str, Space]] = {}
    if (through := stream(flat)) is not None:
        space = Space(STREAM, Kind.RESIDUAL, through.width, _group(through), block=0, stage=0)
        found[STREAM] = through.name, space
    parts = channels(flat)
    several = Counter(map(_block, parts))
    for own, part in parts.items():
        block, s = _block(own), flat.spaces[own]
        name = f"{Kind.MLP}.{block}" + (f".{part}" if several[block] > 1 else "")
        dim = s.width // s.copies
        space = Space(name, Kind.MLP, dim, Group.PERMUTATION, s.copies, block=block, part=part)
        found[name] = own, space
    model = on_meta(config)
    for own, least in experts(
        flat, chosen(model)
    ).items():  # of others nobody knows how many must stay
        name, block, n = f"{Kind.EXPERTS}.{_block(own)}", _block(own), flat.spaces[own].width
        space = Space(name, Kind.EXPERTS, n, Group.PERMUTATION, block=block, least=least)
        found[name] = own, space
    groups = dict[str, Groups]()
    for own, together in heads(flat).items():
        read = [p for _, p in head_places(flat, own, together)]
        if read:
            name, block, n = f"{Kind.HEADS}.{_block(own)}", _block(own), len(together)
            grain = read[0].at[0].size // n
            space = Space(name, Kind.HEADS, n, Group.PERMUTATION, grain=grain, block=block)
            found[name], groups[name] = (own, space), together
    of_values = [n for n in values(flat) if blocks(flat.spaces[n]).shape[1] > 1]
    several = Counter(map(_block, of_values))
    for own in of_values:
        copies, dim = blocks(flat.spaces[own]).shape
        block, stem = _block(own), own.partition("@")[0]
        name = f"{Kind.VO}.{block}" + (f".{stem}" if several[block] > 1 else "")
        found[name] = own, Space(name, Kind.VO, dim, Group.INVERTIBLE, copies, block=block)
    own_names = {o: n for n, (o, _) in found.items()}
    return DerivedLayout(
        description,
        {n: s for n, (_, s) in found.items()},
        {n: o for n, (o, _) in found.items()},
        tuple(_costs(model, flat, own_names)),
        _tied(model),
        model,
        groups,
    )


def _group(stream: d.Space) -> Group:
    return Group.ORTHOGONAL if stream.kind in (d.Kind.O, d.Kind.O1) else Group.SIGNED_PERMUTATION


def _block(own: str) -> int:
    numbers = re.findall(r"\d+", own.partition("@")[2])
    return int(numbers[-1]) if numbers else 0


def _costs(model: PreTrainedModel, flat: d.Flat, names: Mapping[str, str]) -> Iterable[Cost]:
    """Every parameter, a tied one once; outside of the layers, what writes the stream first is the embedding."""
    layers = tuple(_stems(flat))
    for name, p in model.named_parameters():
        described = flat.of.get(name, [])
        axes = []
        for a in described:
            for label in a.axis.labels:
                where = Counter[str]()
                for symbol, codes in expand(label):
                    own = None if symbol == RIGID else names.get(a.space(symbol))
                    if own is not None:
                        where[own] += len(codes)
                if where:
                    axes.append((math.prod(p.shape[k] for k in a.axis.dims), where))
        first = any(pt.writes and pt.number == 0 for a in described for pt in a.axis.points)
        inside = name.startswith(layers)
        part = "blocks" if inside else "embedding" if first else "head"
        yield Cost(p.numel(), part, tuple(axes))


def _stems(flat: d.Flat) -> set[str]:
    """What the names of parameters in layers begin with."""
    return {a.stem for a in flat.axes.values() if a.stem}


def _tied(model: PreTrainedModel) -> int:
    """How many numbers the head has that are the table's."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if table is None or head is None or head.weight is not table.weight:
        return 0
    return sum(p.numel() for p in head.parameters())
