"""From a derivation to its description: axes as patterns of the spaces' coordinates, layers alike told once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from torch import nn

from ..derive.trace import Example
from .description import Axis, Description, Fold, Gain, Kind, Part, Point, Space
from .pattern import BARE, RIGID, Pattern, Power, Run, Symbol, compress
from .points import points
from .source import Key, Line, Source, Split, lines
from .spaces import MATRICES, Draft, Home, drafts


def describe(
    source: Source,
    what: str = "",
    stands: Mapping[int, Sequence[int]] | None = None,
    seen_by: tuple[nn.Module, Example] | None = None,
) -> Description:
    """The description of a derivation. Two layers that carry the same share one text.

    ``stands``: of each traced layer, the layers of the real model that it stands for. ``seen_by``: the model and an
    input, where the points of the stream are to be told.
    """
    axes = lines(source)
    found = drafts(source, axes)
    at = points(source, axes, found, *seen_by) if seen_by is not None else {}
    made = [_axis(source, line, found, at) for line in axes]
    return _assembled(what, source, found, made, stands)


# ---- axes


def _axis(
    source: Source, line: Line, found: Sequence[Draft], points: Mapping[Key, Sequence[Point]]
) -> Axis:
    here = [d for d in found if line.key in d.codes and (d.codes[line.key] >= 0).any()]
    first = [d for d in here if d.kind in MATRICES or d.kind is Kind.PERM]
    labels = [_label(line, first)] + [_label(line, [d]) for d in here if d not in first]
    home = line.home
    folds = tuple(_folds(source, line))
    folds = tuple(
        replace(
            f,
            gain=Split.of(f.gain).rest if home and Split.of(f.gain).home == home else f"/{f.gain}",
        )
        for f in folds
    )
    if home is None:
        folds = tuple(replace(f, gain=f.gain.removeprefix("/")) for f in folds)
    gain = source.gains.get(line.parameter)
    name = Split.of(line.parameter).rest
    told = None if gain is None else Gain(*gain)
    return Axis(name, line.dims, tuple(labels), folds, told, tuple(points.get(line.key, ())))


def _label(line: Line, drafts: Sequence[Draft]) -> Pattern:
    which, codes = np.zeros(len(line.ids), np.int64), np.zeros(len(line.ids), np.int64)
    symbols: dict[Symbol, int] = {RIGID: 0}
    for d in drafts:
        code = d.codes[line.key]
        at = np.flatnonzero(code >= 0)
        if d.powers:
            rows = zip(*(p[line.key][at] for p in d.powers), strict=True)
            found = [Symbol(d.name, _short(d.scales, row)) for row in rows]
        else:
            found = [Symbol(d.name)] * len(at)
        which[at] = [symbols.setdefault(s, len(symbols)) for s in found]
        codes[at] = code[at]
    if not which.any():
        return (Run(RIGID, 0),)
    return compress(list(symbols), which, codes)


def _short(scales: str, powers: Sequence[Power]) -> tuple[Power, ...]:
    """No powers where each is 1; one where it stands for all (for a sign, its parity)."""
    one = powers[0]
    if all(
        p == (one % 2 if letter == "±" else one)
        for p, letter in zip(powers, scales or "R", strict=True)
    ):
        return () if one == 1 else (one,)
    return tuple(powers)


def _folds(source: Source, line: Line) -> list[Fold]:
    found = defaultdict[tuple[str, int], dict[int, int]](dict)
    for p, a in enumerate(line.ids.tolist()):
        if a in source.folds:
            gain, entry, power = source.folds[a]
            if source.gains[gain][1]:
                found[gain, power][p] = entry
    made = []
    width = source.shapes[line.parameter][line.dims[-1]]
    for (gain, power), entries in sorted(found.items()):
        at = np.array(sorted(entries))
        value = np.array([entries[p] for p in at.tolist()])
        if len(at) == len(line.ids) and (value == at % width).all():
            made.append(Fold(gain, power))
            continue
        which, codes = np.zeros(len(line.ids), np.int64), np.zeros(len(line.ids), np.int64)
        which[at], codes[at] = 1, value
        made.append(Fold(gain, power, compress([RIGID, BARE], which, codes)))
    return made


# ---- parts


def _assembled(
    what: str,
    source: Source,
    found: Sequence[Draft],
    axes: Sequence[Axis],
    stands: Mapping[int, Sequence[int]] | None,
) -> Description:
    homes = defaultdict[Home, Part](Part)
    names = [line.parameter for line in lines(source)]
    told = defaultdict[Home, list[Axis]](list)
    for name, axis in zip(names, axes, strict=True):
        told[Split.of(name).home].append(axis)
    spaces = defaultdict[Home, list[Space]](list)
    for d in found:
        if d.stem:
            spaces[d.home].append(
                Space(d.name, d.kind, d.width, d.copies, d.patterns, d.scales, d.moves)
            )
    unseen = _listed(source.unseen)
    rigid = _listed([n for n in source.shapes if n not in {*names, *source.unseen}])
    for home in {*told, *spaces, *unseen, *rigid}:
        homes[home] = Part(
            home[0] if home else "",
            (),
            tuple(spaces[home]),
            tuple(told[home]),
            tuple(rigid.get(home, ())),
            tuple(unseen.get(home, ())),
        )
    whole = homes.pop(None, Part())
    return Description(what, whole, _alike(homes, stands or {}))


def _listed(names: Sequence[str]) -> dict[Home, list[str]]:
    made = defaultdict[Home, list[str]](list)
    for n in names:
        made[Split.of(n).home].append(Split.of(n).rest)
    return made


def _alike(homes: Mapping[Home, Part], stands: Mapping[int, Sequence[int]]) -> tuple[Part, ...]:
    """Layers that carry the same share one part."""
    layers = defaultdict[Part, list[int]](list)
    for home in sorted(home for home in homes if home is not None):
        part = homes[home]
        layers[part] += stands.get(home[1], [home[1]])
    return tuple(replace(part, layers=tuple(sorted(numbers))) for part, numbers in layers.items())
