"""Which config says given widths: keys are found by changing them and building on meta, not by their names."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field

from transformers import PretrainedConfig, PreTrainedModel

from ..described.weightless import Class
from .aloud import said_aloud
from .keys import Change, Key, Shapes, built, changed, keys, shapes, together

MOST = 120  # models built on meta at most


@dataclass(frozen=True)
class Spoken:
    """A config whose model has the shapes asked for, and what was changed for it."""

    config: PretrainedConfig
    changes: tuple[Change, ...]
    model: PreTrainedModel = field(repr=False)  # on meta


@dataclass(frozen=True)
class Search:
    """What was found: the config that says all, if there is one, and models of keys that say a part of it."""

    said: Spoken | None
    pairs: frozenset[tuple[int, int]]  # extents: was, is to be
    partly: tuple[PreTrainedModel, ...] = field(repr=False)


Changes = frozenset[tuple[Key, str]]  # keys, and their values as text: lists are no members of sets


def mark(changes: Sequence[Change]) -> Changes:
    """What tells some changes from others."""
    return frozenset((c.key, repr(c.value)) for c in changes)


def search(
    config: PretrainedConfig, base: PreTrainedModel, target: Shapes, but: Set[Changes] = frozenset()
) -> Search:
    """Which config says the target's shapes: keys are changed one by one, then together.

    Empty keys are said first, at the value that stands for them now, so that each key holds one width alone.
    ``but``: changes that are known to compute something else (narrower heads have the shapes of fewer heads).
    """
    was = shapes(base)
    pairs = frozenset(
        (o, n) for name, s in was.items() for o, n in zip(s, target[name], strict=True) if o != n
    )
    aloud = said_aloud(config, base)
    left = _Left(config, aloud, target, itertools.count(), type(base), but)
    good, mixed, partly = list[Change](), list[Change](), list[PreTrainedModel]()
    for change in _candidates(changed(config, aloud), pairs):
        if next(left.budget) > MOST:
            break
        made = built(config, together(aloud, [change]), left.kind)
        if made is None:
            continue
        now = shapes(made)
        if now == target:
            found = _spoken(left, [change])
            if found is not None:
                return Search(found, pairs, ())
            continue
        right, wrong = _compared(was, now, target)
        if right:
            partly.append(made)
            (mixed if wrong else good).append(change)
    return Search(_joined(left, good, mixed), pairs, tuple(partly))


@dataclass(frozen=True)
class _Left:
    """What is searched for still, and how many models may be built for it."""

    config: PretrainedConfig
    aloud: list[Change]
    target: Shapes
    budget: Iterator[int]
    kind: Class
    but: Set[Changes]


def _joined(left: _Left, good: list[Change], mixed: list[Change]) -> Spoken | None:
    """Several keys at once: all that move nothing wrong, then with one that others must mend, or that others of its number
    go along with."""
    alone = _one_each(good)
    for more in ([], *([m] for m in mixed), *([m, *_alike(left, [m])] for m in mixed)):
        changes = together(alone, more)
        if not changes:
            continue
        if next(left.budget) > MOST:
            return None
        if _says(left, together(left.aloud, changes)):
            found = _spoken(left, changes)
            if found is not None:
                return found
    return None


def _spoken(left: _Left, changes: Sequence[Change]) -> Spoken | None:
    """What says the target, with what goes along where it alone is known to compute something else; None where both are."""
    found = _lean(left, changes)
    for attempt in _with_others(left, found):
        if mark(attempt) not in left.but:
            made = built(left.config, attempt, left.kind)
            assert made is not None  # it was built before
            return Spoken(changed(left.config, attempt), tuple(attempt), made)
    return None


def _lean(left: _Left, changes: Sequence[Change]) -> list[Change]:
    """Of the empty keys that were said, those alone that must be."""
    found = together(left.aloud, changes)
    for said in left.aloud:
        fewer = [c for c in found if c != said]
        if len(fewer) < len(found) and _says(left, fewer):
            found = fewer
    return found


def _with_others(left: _Left, found: list[Change]) -> Iterator[list[Change]]:
    """Changes alone, then with keys of the same value that no shape follows from: modules count heads by two of them."""
    yield found
    if mark(found) not in left.but:
        return
    along = [c for c in _alike(left, found) if _says(left, together(found, [c]))]
    yield from (together(found, some) for some in ([c] for c in along))
    if _says(left, together(found, along)):
        yield together(found, along)


def _alike(left: _Left, found: Sequence[Change]) -> list[Change]:
    """What makes keys that hold the same number as one that changes hold its new one too."""
    now, others = dict(keys(left.config)), {c.key for c in found}
    new = {now[c.key]: c.value for c in found if type(now.get(c.key)) is int}
    return [
        Change(k, new[v]) for k, v in now.items() if type(v) is int and v in new and k not in others
    ]


def _says(left: _Left, changes: Sequence[Change]) -> bool:
    made = built(left.config, changes, left.kind)
    return made is not None and shapes(made) == left.target


def _one_each(changes: list[Change]) -> list[Change]:
    first = dict[Key, Change]()
    for c in changes:
        first.setdefault(c.key, c)
    return list(first.values())


def _candidates(config: PretrainedConfig, pairs: Set[tuple[int, int]]) -> Iterator[Change]:
    """Keys that may hold one of the widths, or a multiple or part of it."""
    for key, value in keys(config):
        if type(value) is int and value > 1:
            scaled = {
                n * value // o
                for o, n in pairs
                if (o % value == 0 or value % o == 0) and not n * value % o
            }
            yield from (Change(key, v) for v in sorted(scaled) if v > 0)
    for key, value in keys(config):
        if isinstance(value, list) and value and all(type(v) is int for v in value):
            for o, n in sorted(pairs):
                if o in value:
                    yield Change(key, [n if v == o else v for v in value])
    numbers = {v for _, v in keys(config) if type(v) is int and v > 1}
    fewer = {(o - n) // m for o, n in pairs for m in numbers if (o - n) % m == 0}
    fewer &= {d for d in fewer if all(not (o - n) % d for o, n in pairs)}  # a part of every width
    for key, value in keys(config):
        if type(value) is int:
            yield from (Change(key, value - d) for d in sorted(fewer) if 1 < value - d < value)


def _compared(was: Shapes, now: Shapes, target: Shapes) -> tuple[bool, bool]:
    """Whether extents became what was asked for, and whether others became something else."""
    if was.keys() != now.keys() or any(len(was[n]) != len(now[n]) for n in was):
        return False, False
    extents = [e for n in was for e in zip(was[n], now[n], target[n], strict=True)]
    return any(o != x == n for o, x, n in extents), any(o != x != n for o, x, n in extents)
