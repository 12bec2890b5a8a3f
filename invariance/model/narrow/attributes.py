"""What modules note of the widths of their parameters, found by comparing modules, not by names."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from .keys import Change, built, keys

Extent = tuple[str, int]  # a parameter of a module, and one of its dims
Shapes = Mapping[str, tuple[int, ...]]


def whole_numbers(module: nn.Module) -> dict[str, Any]:
    """Whole numbers and tuples of them that a module holds."""
    return {
        k: v
        for k, v in vars(module).items()
        if not k.startswith("_") and (type(v) is int or (type(v) is tuple and v and _numbers(v)))
    }


def _numbers(value: tuple[Any, ...]) -> bool:
    return all(type(x) is int for x in value)


def extents(models: Iterable[nn.Module]) -> dict[type, dict[str, set[Extent]]]:
    """Of each class, which attribute is which extent of a parameter: in every module of all models alike."""
    found = defaultdict[type, dict[str, set[Extent]]](dict)
    for model in models:
        for module in model.modules():
            own = {n: tuple(p.shape) for n, p in module.named_parameters(recurse=False)}
            for k, v in whole_numbers(module).items() if own else ():
                here = {(n, d) for n, s in own.items() for d in range(len(s)) if _is(v, s, d)}
                known = found[type(module)].get(k)
                found[type(module)][k] = here if known is None else known & here
    return dict(found)


def _is(value: Any, shape: tuple[int, ...], dim: int) -> bool:
    if type(value) is int:
        return value == shape[dim]
    return value == shape[dim:] and len(value) == 1


def note(model: nn.Module, was: Shapes, known: Mapping[type, Mapping[str, set[Extent]]]) -> None:
    """Modules whose parameters were narrowed note their new extents."""
    for prefix, module in model.named_modules():
        own = {n: tuple(p.shape) for n, p in module.named_parameters(recurse=False)}
        for k, places in known.get(type(module), {}).items():
            changed = {
                own[n][d]
                for n, d in places
                if n in own and own[n][d] != was[f"{prefix}.{n}" if prefix else n][d]
            }
            still = any(
                n in own and own[n][d] == was[f"{prefix}.{n}" if prefix else n][d]
                for n, d in places
            )
            if len(changed) == 1 and not still:
                value = changed.pop()
                setattr(module, k, value if type(getattr(module, k)) is int else (value,))


def moved(base: nn.Module, other: nn.Module) -> dict[tuple[str, str], tuple[Any, Any]]:
    """Attributes that two models of one structure hold differently: (module, attribute): (was, is)."""
    others = dict(other.named_modules())
    return {
        (name, k): (v, getattr(others[name], k))
        for name, module in base.named_modules()
        if name in others
        for k, v in whole_numbers(module).items()
        if k in vars(others[name]) and getattr(others[name], k) != v
    }


@dataclass(frozen=True)
class OfHeads:
    """What holds the width of a head: (module, attribute), and buffers with their dim and length."""

    attributes: frozenset[tuple[str, str]]
    buffers: frozenset[tuple[str, int, int]]


def of_heads(config: PretrainedConfig, base: PreTrainedModel, width: int) -> OfHeads:
    """What halves where a key of the config doubles: there are twice as many heads then, each half as wide."""
    attributes, buffers = set[tuple[str, str]](), set[tuple[str, int, int]]()
    for key, number in keys(config):
        if type(number) is not int or number < 1:
            continue
        for other in (2 * number, number // 2):
            twin = built(config, [Change(key, other)], type(base)) if other else None
            if twin is None:
                continue
            halved = {
                place
                for place, (was, now) in moved(base, twin).items()
                if was == width and type(now) is int and now * other == was * number
            }
            attributes |= halved
            held = dict(twin.named_buffers())
            for name, b in base.named_buffers() if halved else ():
                for d, (was, now) in enumerate(zip(b.shape, held[name].shape, strict=True)):
                    if was != now and now * other == was * number:
                        buffers.add((name, d, was))
    return OfHeads(frozenset(attributes), frozenset(buffers))
