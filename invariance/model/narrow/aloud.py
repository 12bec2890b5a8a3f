"""Empty keys of a config said at the value that stands for them, so that each key holds one width alone."""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from ..described.weightless import Class, on_meta
from .keys import Change, Key, Shapes, built, keys, shapes, together


def said_aloud(config: PretrainedConfig, base: PreTrainedModel) -> list[Change]:
    """Empty keys that shapes follow from, each at the value that leaves all shapes as they are."""
    was, kind, made = shapes(base), type(base), list[Change]()
    beyond = 2 * max(max(s, default=1) for s in was.values())
    for key in empty(config, kind):
        values = set[int]()
        for tried in (1, beyond):  # neither is what the key stands for, unless that is 1
            other = built(config, [Change(key, tried)], kind)
            if other is not None:
                values = _stood_for(was, shapes(other), tried)
                break
        for v in sorted(values):
            same = built(config, together(made, [Change(key, v)]), kind)
            if same is not None and shapes(same) == was:
                made.append(Change(key, v))
                break
    return made


def empty(config: PretrainedConfig, kind: Class) -> list[Key]:
    """Keys that are empty, and those that modules ask for and the config has not."""
    asked, unset = dict[Key, None](), [k for k, value in keys(config) if value is None]
    twin = copy.deepcopy(config)
    holders = {k.path: k.holder(twin) for k, _ in keys(twin)}
    for path, holder in holders.items():

        def missing(self: Any, name: str, path: tuple[str, ...] = path) -> Any:
            if not name.startswith("_"):
                asked[Key(path, name)] = None
            raise AttributeError(name)

        own = type(holder)
        holder.__class__ = type(own.__name__, (own,), {"__getattr__": missing})
    with suppress(Exception):
        on_meta(twin, kind)
    return list(dict.fromkeys([*unset, *asked]))


def _stood_for(was: Shapes, now: Shapes, value: int) -> set[int]:
    """What a key may stand for where it is empty: extents follow from it, and ``now`` it is this value."""
    if was.keys() != now.keys() or any(len(was[n]) != len(now[n]) for n in was):
        return set()
    extents = {e for n in was for e in zip(was[n], now[n], strict=True)}
    return {o * value // x for o, x in extents if o != x and x and not o * value % x}
