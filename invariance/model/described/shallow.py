"""A model of real width and few layers: one or two of each type of layer stand for all others."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ...core.errors import InputError
from .weightless import on_meta, weightless

VOCABULARY = 67
Told = tuple[object, ...]  # what a layer's modules and the config's lists say of it


@dataclass(frozen=True)
class Shallow:
    """The shallow model; ``stands``: of each of its layers, the layers of the full one that it stands for."""

    model: PreTrainedModel
    full: PreTrainedModel = field(repr=False)  # on meta
    stands: Mapping[int, tuple[int, ...]]


def shallow(
    config: PretrainedConfig, full: PreTrainedModel | None = None, each: int = 2
) -> Shallow:
    """A few layers of each type at full width: ``each`` where there is one type, else one.

    Refused where no choice of layers makes layers like the full model's.
    """
    full = on_meta(config) if full is None else full
    text = config.get_text_config()
    count = text.num_hidden_layers
    types = layer_types(full, text, count)
    each = each if len(types) == 1 else 1
    numbers = _numbers(full, count)
    first = sorted(layer for layers in types for layer in layers[:each])
    for kept in (first, list(range(1 + max(layers[0] for layers in types)))):
        made = fewer_layers(config, count, kept)
        small = on_meta(made)
        alike = (
            _said(small, len(kept), j, numbers) == _said(full, count, layer, numbers)
            for j, layer in enumerate(kept)
        )
        if all(alike):
            break
    else:
        raise InputError(
            "layout: no few layers of this config are layers as the full model has them. "
            "Derive the layout of a small config of the same type instead."
        )
    stands = {j: tuple[int, ...]() for j in range(len(kept))}
    for layers in types:
        last = [j for j, layer in enumerate(kept) if layer in layers][-1]
        for layer in layers:
            j = kept.index(layer) if layer in kept else last
            stands[j] = (*stands[j], layer)
    return Shallow(weightless(made), full, stands)


def layer_types(model: nn.Module, config: PretrainedConfig, count: int) -> list[list[int]]:
    """Layers by what their modules and the config's lists say of them."""
    types = defaultdict[Told, list[int]](list)
    numbers = _numbers(model, count)
    lists = per_layer(config, count).values()
    for layer in range(count):
        told = _said(model, count, layer, numbers)
        types[*told, *(str(v[layer]) for v in lists)].append(layer)
    return list(types.values())


def per_layer(config: PretrainedConfig, count: int) -> dict[str, Sequence[Any]]:
    """The config's lists with an entry a layer."""
    found = vars(config).items()
    return {
        k: v
        for k, v in found
        if isinstance(v, (list, tuple)) and len(v) == count and not k.startswith("_")
    }


def fewer_layers(config: PretrainedConfig, count: int, kept: Sequence[int]) -> PretrainedConfig:
    """The config with these layers and a small vocabulary."""
    made = copy.deepcopy(config)
    text = made.get_text_config()
    for k, v in per_layer(text, count).items():
        setattr(text, k, [v[i] for i in kept])
    text.num_hidden_layers = len(kept)
    text.vocab_size = VOCABULARY
    for k in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(text, k, None) is not None:
            setattr(text, k, 1)
    return made


def stacks(model: nn.Module, count: int) -> list[str]:
    """Names of the lists that hold the layers."""
    named = model.named_modules()
    return [n for n, m in named if isinstance(m, nn.ModuleList) and len(m) == count]


def _layers(model: nn.Module, count: int, layer: int) -> Iterator[tuple[str, nn.Module]]:
    """The modules of one layer, by their names within."""
    for stack in stacks(model, count):
        for name, module in model.get_submodule(f"{stack}.{layer}").named_modules():
            yield f"{stack}.{name}", module


def _plain(module: nn.Module) -> dict[str, object]:
    held = vars(module).items()
    return {k: v for k, v in held if isinstance(v, (int, float, str)) and not k.startswith("_")}


def _numbers(model: nn.Module, count: int) -> set[tuple[str, str]]:
    """Attributes that say which layer a module is in: its number, in every layer that has one."""
    values = defaultdict[tuple[str, str], list[bool]](list)
    for layer in range(count):
        for name, module in _layers(model, count, layer):
            for k, v in _plain(module).items():
                values[name, k].append(type(v) is int and v == layer)
    return {key for key, right in values.items() if all(right)}


def _said(model: nn.Module, count: int, layer: int, numbers: Set[tuple[str, str]]) -> Told:
    """What a layer is, as far as its modules say it: classes, shapes, plain attributes but its number."""
    told = list[object]()
    for name, module in _layers(model, count, layer):
        plain = [(k, v) for k, v in _plain(module).items() if (name, k) not in numbers]
        shapes = [(k, tuple(p.shape)) for k, p in module.named_parameters(recurse=False)]
        told.append((name, type(module).__name__, tuple(sorted(plain)), tuple(shapes)))
    return tuple(told)
