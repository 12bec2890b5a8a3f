"""Free scales of coordinates as generators: which positions each reaches, with which power."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from .source import Key, Line, Scales, Source, first_seen

SMALL = 1e-9


@dataclass(frozen=True)
class Touched:
    """Positions of an axis, the generator (its number within the family) and the power there, in parallel."""

    positions: np.ndarray
    generators: np.ndarray
    powers: np.ndarray


@dataclass(frozen=True)
class Family:
    """Generators alike: of one kind (R or ±), reaching the same axes with the same powers as often."""

    letter: str
    size: int
    touched: Mapping[Key, Touched] = field(repr=False)


def families(source: Source, lines: Sequence[Line], mixed: np.ndarray) -> list[Family]:
    """All generators but those that only scale what a group of matrices mixes (``mixed`` ids) anyway."""
    rank = _ranks(source, lines)
    made = []
    for letter, parts in (("R", source.logs), ("±", source.signs)):
        reach = _reach(source, lines, _powers(parts, rank, letter))
        inside = [g for g, r in reach.items() if all(mixed[line.ids[p]].all() for line, p, _ in r)]
        for g in inside:
            del reach[g]
        made += _grouped(letter, reach)
    return made


def _ranks(source: Source, lines: Sequence[Line]) -> Mapping[int, int]:
    """Roots of scales, numbered as the axes come to them."""
    if not lines:
        return {}
    found = first_seen(np.concatenate([source.scale_root[line.ids] for line in lines]))
    return {int(r): i for i, r in enumerate(found)}


def _powers(
    parts: Iterable[Scales], rank: Mapping[int, int], letter: str
) -> Mapping[int, list[tuple[int, Fraction]]]:
    """Of each root, its generators and powers. Each generator is 1 at the earliest root that it has for itself."""
    powers = defaultdict[int, list[tuple[int, Fraction]]](list)
    number = 0
    for part in parts:
        last = len(rank)
        order = sorted(range(len(part.roots)), key=lambda i: rank.get(part.roots[i], last))
        B = reduced(part.basis[order], modulo=2 if letter == "±" else 0)
        for column in B.T:
            for i in np.flatnonzero(np.abs(column) > SMALL):
                value = Fraction(float(column[i])).limit_denominator(64)
                powers[part.roots[order[i]]].append((number, value))
            number += 1
    return powers


def reduced(B: np.ndarray, modulo: int = 0) -> np.ndarray:
    """The one basis of the columns' span whose pivots are at the first rows."""
    M, row = B.T.astype(float).copy(), 0
    for c in range(M.shape[1]):
        if row == len(M):
            break
        k = row + int(np.abs(M[row:, c]).argmax())
        if abs(M[k, c]) < SMALL:
            continue
        M[[row, k]] = M[[k, row]]
        M[row] /= M[row, c]
        others = np.flatnonzero(np.abs(M[:, c]) > SMALL)
        others = others[others != row]
        M[others] -= np.outer(M[others, c], M[row])
        if modulo:
            M %= modulo
        row += 1
    return np.round(M[:row].T, 9) + 0.0


Reach = list[tuple[Line, int, Fraction]]  # axis, position, power


def _reach(
    source: Source, lines: Sequence[Line], powers: Mapping[int, list[tuple[int, Fraction]]]
) -> dict[int, Reach]:
    reach = defaultdict[int, Reach](list)
    for line in lines:
        roots = source.scale_root[line.ids].tolist()
        signs = source.scale_sign[line.ids].tolist()
        for p, (r, s) in enumerate(zip(roots, signs, strict=True)):
            for g, value in powers.get(r, ()):
                reach[g].append((line, p, value * s))
    return dict(reach)


def _grouped(letter: str, reach: Mapping[int, Reach]) -> list[Family]:
    alike = defaultdict[object, list[int]](list)
    for g, r in reach.items():
        profile = defaultdict[tuple[Key, Fraction], int](int)
        for line, _, value in r:
            profile[line.key, value % 2 if letter == "±" else value] += 1
        alike[tuple(profile.items())].append(g)
    return [_family(letter, [reach[g] for g in gs]) for gs in alike.values()]


def _family(letter: str, reaches: Sequence[Reach]) -> Family:
    first = reaches[0][0][0].key
    reaches = sorted(reaches, key=lambda r: min(p for line, p, _ in r if line.key == first))
    rows = defaultdict[Key, list[tuple[int, int, Fraction]]](list)
    for g, r in enumerate(reaches):
        for line, p, value in r:
            rows[line.key].append((p, g, value % 2 if letter == "±" else value))
    touched = {}
    for key, found in rows.items():
        found.sort(key=lambda x: x[:2])
        positions, generators, powers = zip(*found, strict=True)
        touched[key] = Touched(
            np.array(positions), np.array(generators), np.array(powers, dtype=object)
        )
    return Family(letter, len(reaches), touched)
