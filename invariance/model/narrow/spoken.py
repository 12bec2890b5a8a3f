"""Which config says given widths: keys are found by changing them and building on meta, not by their names."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ..described.weightless import on_meta

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
    named = model.named_parameters(remove_duplicate=False)
    return {name: tuple(p.shape) for name, p in named}


def spoken(config: PretrainedConfig, base: nn.Module, target: Shapes) -> Spoken | None:
    """The config that says the target's shapes, if keys that can be found say them."""
    was = shapes(base)
    budget = itertools.count()
    pairs = {
        (o, n) for name, s in was.items() for o, n in zip(s, target[name], strict=True) if o != n
    }
    good, mixed = list[Change](), list[Change]()
    for change in _candidates(config, pairs):
        if next(budget) > MOST:
            break
        built = _built(config, [change])
        if built is None:
            continue
        now = shapes(built)
        if now == target:
            return Spoken(changed(config, [change]), (change,), built)
        right, wrong = _compared(was, now, target)
        if right:
            (mixed if wrong else good).append(change)
    return _together(config, target, good, mixed, budget)


def _together(
    config: PretrainedConfig,
    target: Shapes,
    good: list[Change],
    mixed: list[Change],
    budget: Iterator[int],
) -> Spoken | None:
    """Several keys at once; a key that moves too much with another that holds the rest in place."""
    alone = _one_each(good)
    for more in ([], *([m] for m in mixed)):
        changes = [*(c for c in alone if all(c.key != m.key for m in more)), *more]
        if not changes or next(budget) > MOST:
            continue
        found = _tried(config, changes, target)
        if found is not None:
            return found
        for pin in _pins(config, target, changes):
            if next(budget) > MOST:
                break
            found = _tried(config, [*changes, pin], target)
            if found is not None:
                return found
    return None


def _one_each(changes: list[Change]) -> list[Change]:
    first = dict[Key, Change]()
    for c in changes:
        first.setdefault(c.key, c)
    return list(first.values())


def _tried(config: PretrainedConfig, changes: list[Change], target: Shapes) -> Spoken | None:
    built = _built(config, changes)
    if built is None or shapes(built) != target:
        return None
    return Spoken(changed(config, changes), tuple(changes), built)


def _candidates(config: PretrainedConfig, pairs: set[tuple[int, int]]) -> Iterator[Change]:
    """Keys that may hold one of the widths, or a multiple or part of it."""
    for key, value in keys(config):
        if type(value) is int and value > 1:
            scaled = {
                n * value // o
                for o, n in pairs
                if (o % value == 0 or value % o == 0) and not n * value % o
            }
            yield from (Change(key, v) for v in sorted(scaled) if v > 0)
        elif value is None:
            yield from (Change(key, n) for n in sorted({n for _, n in pairs})[:3])
        elif isinstance(value, list) and value and all(type(v) is int for v in value):
            for o, n in sorted(pairs):
                if o in value:
                    yield Change(key, [n if v == o else v for v in value])


def _pins(config: PretrainedConfig, target: Shapes, changes: list[Change]) -> Iterator[Change]:
    """Empty keys said out loud: what a width that must stay was computed as."""
    taken = {c.key for c in changes}
    numbers = sorted({v for _, v in keys(config) if type(v) is int and 1 < v <= 1024})
    extents = sorted({e for s in target.values() for e in s})
    values = [v for v in numbers if any(e % v == 0 for e in extents)]
    heads = sorted({e // n for e in extents for n in numbers if e % n == 0 and e // n > 1})
    for key, value in keys(config):
        if value is None and key not in taken:
            yield from (Change(key, v) for v in dict.fromkeys([*heads, *values]))


def _built(config: PretrainedConfig, changes: Sequence[Change]) -> PreTrainedModel | None:
    try:
        return on_meta(changed(config, changes))
    except Exception:  # a config that cannot be says so in many ways
        return None


def _compared(was: Shapes, now: Shapes, target: Shapes) -> tuple[int, int]:
    """How many extents became what was asked for, and how many something else."""
    if was.keys() != now.keys():
        return 0, 1
    right = wrong = 0
    for name, before in was.items():
        if len(before) != len(now[name]):
            return 0, 1
        for o, x, n in zip(before, now[name], target[name], strict=True):
            right += o != x and x == n
            wrong += o != x and x != n
    return right, wrong
