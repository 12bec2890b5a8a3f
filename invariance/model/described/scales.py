"""Free scales of coordinates as generators: which positions each reaches, with which power."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from .pattern import Power, whole
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
        reach = _reach(letter, source, lines, _powers(parts, rank, letter))
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
) -> Mapping[int, list[tuple[int, Power]]]:
    """Of each root, its generators and powers. Each generator is 1 at the earliest root that it has for itself."""
    powers = defaultdict[int, list[tuple[int, Power]]](list)
    known: dict[
        object, list[list[tuple[int, Power]]]
    ] = {}  # coordinates alike have equations alike
    number, last = 0, len(rank)
    for part in parts:
        order = sorted(range(len(part.roots)), key=lambda i: rank.get(part.roots[i], last))
        B = part.basis[order]
        key = B.shape, B.tobytes()
        if key not in known:
            known[key] = [_sparse(c) for c in reduced(B, 2 if letter == "±" else 0).T]
        for column in known[key]:
            for i, value in column:
                powers[part.roots[order[i]]].append((number, value))
            number += 1
    return powers


def _sparse(column: np.ndarray) -> list[tuple[int, Power]]:
    entries = np.flatnonzero(np.abs(column) > SMALL)
    return [(int(i), whole(Fraction(float(column[i])).limit_denominator(64))) for i in entries]


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


Reach = list[tuple[Line, int, Power]]  # axis, position, power


def _reach(
    letter: str,
    source: Source,
    lines: Sequence[Line],
    powers: Mapping[int, list[tuple[int, Power]]],
) -> dict[int, Reach]:
    reach = defaultdict[int, Reach](list)
    inverse = 1 if letter == "±" else -1
    both = {r: {1: found, -1: [(g, inverse * v) for g, v in found]} for r, found in powers.items()}
    for line in lines:
        roots = source.scale_root[line.ids].tolist()
        signs = source.scale_sign[line.ids].tolist()
        for p, (r, s) in enumerate(zip(roots, signs, strict=True)):
            if r in both:
                for g, value in both[r][s]:
                    reach[g].append((line, p, value))
    return dict(reach)


def _grouped(letter: str, reach: Mapping[int, Reach]) -> list[Family]:
    alike = defaultdict[object, list[int]](list)
    for g, r in reach.items():
        profile = defaultdict[tuple[Key, Power], int](int)
        for line, _, value in r:
            profile[line.key, value] += 1
        alike[tuple(profile.items())].append(g)
    return [_family(letter, [reach[g] for g in gs]) for gs in alike.values()]


def _family(letter: str, reaches: Sequence[Reach]) -> Family:
    first = reaches[0][0][0].key
    reaches = sorted(reaches, key=lambda r: min(p for line, p, _ in r if line.key == first))
    rows = defaultdict[Key, list[tuple[int, int, Power]]](list)
    for g, r in enumerate(reaches):
        for line, p, value in r:
            rows[line.key].append((p, g, value))
    touched = {}
    for key, found in rows.items():
        found.sort(key=lambda x: x[:2])
        positions, generators, powers = zip(*found, strict=True)
        touched[key] = Touched(
            np.array(positions), np.array(generators), np.array(powers, dtype=object)
        )
    return Family(letter, len(reaches), touched)
