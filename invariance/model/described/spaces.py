"""The spaces of a derivation: which blocks are alike, where their coordinates lie, which scales go with them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..derive.block import Block
from ..derive.block import Kind as Group
from .description import Kind, Move
from .pattern import Pattern, bare
from .scales import Family, families
from .source import Key, Line, Source, Split, first_seen
from .swaps import Swap, swaps

MATRICES = {Kind.GL, Kind.O, Kind.O1, Kind.C}
Home = tuple[str, int] | None  # prefix and number of a layer; None: the whole model


@dataclass
class Draft:
    """A space while it is found: where its codes lie, and what scales came to it."""

    kind: Kind
    stem: str
    home: Home
    width: int
    codes: Mapping[Key, np.ndarray] = field(repr=False)  # of each position; -1: another's
    powers: list[Mapping[Key, np.ndarray]] = field(default_factory=list, repr=False)
    scales: str = ""
    blocks: tuple[Block, ...] = field(default=(), repr=False)
    patterns: Pattern = ()
    copies: int = 1
    moves: tuple[Move, ...] = ()
    name: str = ""


def drafts(source: Source, axes: Sequence[Line]) -> list[Draft]:
    """All spaces, by name. One without a stem is a further label of the space before it."""
    made = _mixing(source, axes)
    _scaling(source, axes, made)
    made += [_of_swap(s) for s in swaps(source, axes)]
    _name(made)
    return made


def _home(names: Iterable[str]) -> Home:
    """The layer that all parameters lie in."""
    homes = {Split.of(name).home for name in names}
    return next(iter(homes)) if len(homes) == 1 else None


def _mixing(source: Source, axes: Sequence[Line]) -> list[Draft]:
    """Blocks alike, of one layer and found at the same places, are one space."""
    rank = {line.axis: i for i, line in enumerate(axes)}
    alike = defaultdict[object, list[Block]](list)
    for b in source.blocks:
        if b.kind is not Group.NODES:
            alike[b.kind, len(b.classes), b.where, b.stem].append(b)
    order = sorted(alike.values(), key=lambda bs: sorted(rank[a] for a in bs[0].where if a in rank))
    return [d for bs in order if _whole(d := _draft(source, axes, bs))]


def _whole(draft: Draft) -> bool:
    """Whether every axis has each coordinate as often (and as often as the dual): else the space stays rigid."""
    for key, codes in draft.codes.items():
        powers = draft.powers[0][key] if draft.powers else np.ones(len(codes))
        for power in (1, -1):
            there = codes[(codes >= 0) & (powers == power)]
            if len(there) and len(set(np.bincount(there, minlength=draft.width).tolist())) > 1:
                return False
    return True


def _draft(source: Source, axes: Sequence[Line], blocks: Sequence[Block]) -> Draft:
    number = np.full(len(source.root), -1)
    member = np.zeros(len(source.root), bool)
    member[[c for b in blocks for c in b.classes]] = True
    codes, n = dict[Key, np.ndarray](), 0
    for line in axes:
        if line.axis in blocks[0].where:
            roots = source.root[line.ids]
            new = first_seen(roots[member[roots] & (number[roots] < 0)])
            number[new] = np.arange(n, n + len(new))
            n += len(new)
            codes[line.key] = number[roots]
    home = _home(name for name, _ in blocks[0].where)
    made = Draft(Kind(blocks[0].kind.value), blocks[0].stem, home, n, codes, blocks=tuple(blocks))
    size = len(blocks[0].classes)
    if len(blocks) > 1:
        each = [number[list(b.classes)] for b in blocks]
        if made.kind is not Kind.C:
            each = [np.sort(e) for e in each]
        made.patterns = bare(np.concatenate(sorted(each, key=min)), size)
        made.copies = len(blocks)
    if made.kind in (Kind.GL, Kind.C):
        made.powers = [_variance(source, axes, made)]
    return made


def _variance(source: Source, axes: Sequence[Line], draft: Draft) -> Mapping[Key, np.ndarray]:
    """1 where a coordinate comes as on the first axis by name, -1 where it comes as the dual."""
    signs = dict[int, int]()
    by_name = sorted((line for line in axes if line.key in draft.codes), key=lambda x: x.axis)
    for line in by_name:
        for p in np.flatnonzero(draft.codes[line.key] >= 0).tolist():
            signs.setdefault(int(draft.codes[line.key][p]), int(source.scale_sign[line.ids[p]]))
    made = {}
    for line in by_name:
        code = draft.codes[line.key]
        ref = np.array([signs.get(int(c), 1) for c in code])
        made[line.key] = np.array((ref * source.scale_sign[line.ids]).tolist(), dtype=object)
    return made


def _scaling(source: Source, axes: Sequence[Line], drafts: list[Draft]) -> None:
    """Scales that go with a space's coordinates are the space's; others are spaces of their own."""
    mixed = np.zeros(len(source.root), bool)
    for d in drafts:
        if d.kind in MATRICES:
            mixed[[c for b in d.blocks for c in b.classes]] = True
    mixed = mixed[source.root]
    length = {line.key: len(line.ids) for line in axes}
    for f in families(source, axes, mixed):
        home = _home(name for name, _ in f.touched)
        hosts = [
            d
            for d in drafts
            if d.kind in (Kind.PERM, Kind.SCALE) and d.width == f.size and d.home == home
        ]
        if not any(_attach(d, f) for d in hosts):
            drafts += _own(f, length)


def _attach(draft: Draft, f: Family) -> bool:
    """Whether every generator is one coordinate's, wherever it reaches; then it is the space's."""
    of = np.full(f.size, -1)
    for key, t in f.touched.items():
        if key not in draft.codes or len(set(t.positions.tolist())) < len(t.positions):
            return False
        code = draft.codes[key][t.positions]
        known = of[t.generators]
        if (code < 0).any() or ((known >= 0) & (known != code)).any():
            return False
        of[t.generators] = code
        if (of[t.generators] != code).any():
            return False
    if len(set(of.tolist())) < f.size:
        return False
    powers = {}
    for key, codes in draft.codes.items():
        values = np.full(len(codes), 0, dtype=object)
        if key in f.touched:
            values[f.touched[key].positions] = f.touched[key].powers
        powers[key] = values
    draft.powers.append(powers)
    draft.scales += f.letter
    return True


def _own(f: Family, length: Mapping[Key, int]) -> list[Draft]:
    """A space of scales; where several of its generators reach one position, one label for each."""
    home = _home(name for name, _ in f.touched)
    layers: list[tuple[dict[Key, np.ndarray], dict[Key, np.ndarray]]] = []
    for key, t in f.touched.items():
        nth = np.zeros(len(t.positions), np.int64)
        same = np.concatenate([[False], t.positions[1:] == t.positions[:-1]])
        for i in np.flatnonzero(same):
            nth[i] = nth[i - 1] + 1
        for n in range(int(nth.max()) + 1):
            if n == len(layers):
                layers.append(({}, {}))
            at = nth == n
            codes = np.full(length[key], -1)
            powers = np.full(length[key], 0, dtype=object)
            codes[t.positions[at]], powers[t.positions[at]] = t.generators[at], t.powers[at]
            layers[n][0][key], layers[n][1][key] = codes, powers
    first = Draft(Kind.SCALE, "scale", home, f.size, layers[0][0], [layers[0][1]], f.letter)
    return [first, *(Draft(Kind.SCALE, "", home, f.size, c, [p], f.letter) for c, p in layers[1:])]


def _of_swap(swap: Swap) -> Draft:
    home = _home(name for name, _ in swap.codes)
    return Draft(Kind.SWAP, swap.stem, home, swap.width, swap.codes, moves=swap.moves)


def _name(drafts: Sequence[Draft]) -> None:
    taken = defaultdict[tuple[str, Home], int](int)
    last = ""
    for d in drafts:
        if not d.stem:  # a further label of the space before it
            d.name = last
            continue
        stem = "inner" if d.stem == "residual" and d.home is not None else d.stem
        taken[stem, d.home] += 1
        n = taken[stem, d.home]
        d.name = last = stem + (str(n) if n > 1 else "") + ("@" if d.home is not None else "")
