"""Places in a config that hold numbers, and models on meta of configs where some of them changed."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ..described.weightless import Class, on_meta, stored

Shapes = Mapping[str, tuple[int, ...]]


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


def together(first: Sequence[Change], more: Sequence[Change]) -> list[Change]:
    """Changes of which the later one of a key counts."""
    return list({c.key: c for c in (*first, *more)}.values())


def built(
    config: PretrainedConfig, changes: Sequence[Change], kind: Class
) -> PreTrainedModel | None:
    """The model of a changed config on meta; None where there can be none."""
    try:
        return on_meta(changed(config, changes), kind)
    except Exception:  # a config that cannot be says so in many ways
        return None
