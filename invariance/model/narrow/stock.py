"""Whether the config of a model says all of it: what a model built from that config would do differently."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..described.weightless import stored, weightless
from .keys import keys


def numbers_of(module: nn.Module) -> dict[str, object]:
    """Numbers that a module computes with, as far as they are attributes of it."""
    held = vars(module).items()
    return {k: v for k, v in held if type(v) in (int, float) and not k.startswith("_")}


def differences(model: PreTrainedModel) -> dict[str, tuple[object, object]]:
    """By name: what a model of this config has, and what this model has. Empty: a stock checkpoint holds it."""
    stock = weightless(model.config, kind=type(model))
    found, kept = dict[str, tuple[object, object]](), stored(model)
    others = dict(stock.named_modules())
    for name, module in model.named_modules():
        other = others.get(name)
        if other is None or type(other) is not type(module):
            found[name] = type(other).__name__, type(module).__name__
            continue
        now = numbers_of(module)
        for k, v in numbers_of(other).items():
            if k in now and now[k] != v:
                found[f"{name}.{k}"] = v, now[k]
        for k, p in other.named_parameters(recurse=False):
            mine = getattr(module, k)
            if mine is None or mine.shape != p.shape:
                found[f"{name}.{k}"] = tuple(p.shape), None if mine is None else tuple(mine.shape)
        for k, b in other.named_buffers(recurse=False):
            if f"{name}.{k}" in kept and b.shape == getattr(module, k).shape:
                continue  # a checkpoint stores it
            if not alike(b, getattr(module, k, None)):
                found[f"{name}.{k}"] = b, getattr(module, k, None)
    return found


def alike(one: Tensor, other: Tensor | None) -> bool:
    if other is None or one.shape != other.shape:
        return False
    if not one.is_floating_point():
        return bool((one == other).all())
    return bool(torch.allclose(one.double(), other.double(), rtol=1e-6, atol=0, equal_nan=True))


def speak(model: PreTrainedModel) -> None:
    """Has the config say numbers that modules hold (a norm's eps), where one key says each of them everywhere."""
    open_ = differences(model)
    numbers = {v for v in open_.values() if type(v[0]) is float and type(v[1]) is float}
    for was, now in sorted(numbers):
        for key, value in list(keys(model.config)):
            if type(value) is float and value == was:
                before = len(open_)
                setattr(key.holder(model.config), key.name, now)
                left = differences(model)
                if len(left) < before and not left.keys() - open_.keys():
                    open_ = left
                else:
                    setattr(key.holder(model.config), key.name, was)
