"""Which config says given widths: keys are found by changing them and building on meta, not by their names."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ..described.weightless import Class, on_meta, stored

Shapes = Mapping[str, tuple[int, ...]]
MOST = 120  # models built on meta at most


@dataclass(frozen=True)
class Key:
    """A place in a config: the names of sub-configs on the way, and a name."""

    path: tuple[str, ...]
    name: str

    def holder(self, config: PretrainedConfig) -> PretrainedConfig:
        for step in self.path:
            config = getattr(config, step)
        return config


@dataclass(frozen=True)
class Change:
    key: Key
    value: Any


@dataclass(frozen=True)
class Spoken:
    """A config whose model has the shapes asked for, and what was changed for it."""

    config: PretrainedConfig
    changes: tuple[Change, ...]
    model: PreTrainedModel = field(repr=False)  # on meta


def keys(config: PretrainedConfig, path: tuple[str, ...] = ()) -> Iterator[tuple[Key, Any]]:
    """All plain entries of a config and its sub-configs."""
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig) and len(path) < 2:
            yield from keys(value, (*path, name))
        elif not name.startswith("_"):
            yield Key(path, name), value


def changed(config: PretrainedConfig, changes: Sequence[Change]) -> PretrainedConfig:
    made = copy.deepcopy(config)
    for c in changes:
        setattr(c.key.holder(made), c.key.name, c.value)
    return made


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in stored(model).items()}


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

    ``but``: changes that are known to compute something else (narrower heads have the shapes of fewer heads).
    """
    was, budget, kind = shapes(base), itertools.count(), type(base)
    pairs = frozenset(
        (o, n) for name, s in was.items() for o, n in zip(s, target[name], strict=True) if o != n
    )
    good, mixed = list[Change](), list[tuple[Change, set[tuple[int, int]]]]()
    partly = list[PreTrainedModel]()
    for change in _candidates(config, pairs):
        if next(budget) > MOST:
            break
        made = built(config, [change], kind)
        if made is None:
            continue
        now = shapes(made)
        if now == target and mark([change]) in but:
            continue
        if now == target:
            return Search(Spoken(changed(config, [change]), (change,), made), pairs, ())
        right, wrong = _compared(was, now, target)
        if right:
            partly.append(made)
        if right and wrong:
            mixed.append((change, wrong))
        elif right:
            good.append(change)
    left = _Left(config, target, budget, kind, but)
    return Search(_together(left, good, mixed), pairs, tuple(partly))


@dataclass(frozen=True)
class _Left:
    """What is searched for still, and how many models may be built for it."""

    config: PretrainedConfig
    target: Shapes
    budget: Iterator[int]
    kind: Class
    but: Set[Changes]


def _together(
    left: _Left, good: list[Change], mixed: list[tuple[Change, set[tuple[int, int]]]]
) -> Spoken | None:
    """Several keys at once; a key that moves too much with another that holds the rest in place."""
    alone = _one_each(good)
    none: list[tuple[Change | None, set[tuple[int, int]]]] = [(None, set())]
    for more, wrong in [*none, *mixed]:
        changes = alone
        if more is not None:
            changes = [*(c for c in alone if c.key != more.key), more]
        pinned = [[*changes, pin] for pin in _pins(left.config, wrong, changes)]
        for attempt in ([changes] if changes else []) + pinned:
            if mark(attempt) in left.but:
                continue
            if next(left.budget) > MOST:
                return None
            found = _tried(left, attempt)
            if found is not None:
                return found
    return None


def _one_each(changes: list[Change]) -> list[Change]:
    first = dict[Key, Change]()
    for c in changes:
        first.setdefault(c.key, c)
    return list(first.values())


def _tried(left: _Left, changes: list[Change]) -> Spoken | None:
    made = built(left.config, changes, left.kind)
    if made is None or shapes(made) != left.target:
        return None
    return Spoken(changed(left.config, changes), tuple(changes), made)


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
    numbers = {v for _, v in keys(config) if type(v) is int and v > 1}
    parts = {n // m for o, n in pairs for m in numbers if o % m == n % m == 0 and n > m}
    empty = [*sorted({n for _, n in pairs})[:3], *sorted(parts - {n for _, n in pairs})[:4]]
    for key, value in keys(config):
        if value is None:
            yield from (Change(key, n) for n in empty)
        elif isinstance(value, list) and value and all(type(v) is int for v in value):
            for o, n in sorted(pairs):
                if o in value:
                    yield Change(key, [n if v == o else v for v in value])
    fewer = {(o - n) // m for o, n in pairs for m in numbers if (o - n) % m == 0}
    fewer &= {d for d in fewer if all(not (o - n) % d for o, n in pairs)}  # a part of every width
    for key, value in keys(config):
        if type(value) is int:
            yield from (Change(key, value - d) for d in sorted(fewer) if 1 < value - d < value)


def _pins(
    config: PretrainedConfig, wrong: set[tuple[int, int]], changes: list[Change]
) -> Iterator[Change]:
    """Empty keys said out loud: a width that must stay was computed as that many parts of something."""
    taken = {c.key for c in changes}
    numbers = {v for _, v in keys(config) if type(v) is int and v > 1}
    values = sorted({o // m for o, x in wrong for m in numbers if o % m == x % m == 0 and o > m})
    for key, value in keys(config):
        if value is None and key not in taken:
            yield from (Change(key, v) for v in values)


def built(
    config: PretrainedConfig, changes: Sequence[Change], kind: Class
) -> PreTrainedModel | None:
    """The model of a changed config on meta; None where there can be none."""
    try:
        return on_meta(changed(config, changes), kind)
    except Exception:  # a config that cannot be says so in many ways
        return None


def _compared(was: Shapes, now: Shapes, target: Shapes) -> tuple[bool, set[tuple[int, int]]]:
    """Whether extents became what was asked for, and those that became something else: (was, is)."""
    if was.keys() != now.keys() or any(len(was[n]) != len(now[n]) for n in was):
        return False, set()
    extents = [e for n in was for e in zip(was[n], now[n], target[n], strict=True)]
    return (
        any(o != x == n for o, x, n in extents),
        {(o, x) for o, x, n in extents if o != x != n},
    )
