"""What a narrower model has that a model of its config has not, as plain data, and such a model made of the data."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..described.weightless import stored, weightless
from .attributes import whole_numbers
from .norms import NormOver
from .stock import alike, numbers_of

LARGEST = 100_000  # numbers of a buffer that a config can hold

Extent = Annotated[int, Field(ge=1, le=2**31)]


class NormRecord(BaseModel):
    """A norm that divides by a width which it has no longer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    of: Extent
    centred: bool
    eps: Annotated[float, Field(ge=0, le=1)]
    weight: Extent | None
    bias: Extent | None
    offset: float = 0.0


class Record(BaseModel):
    """By full names: shapes of weights, numbers that modules hold, norms that took another's place, buffers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    family: str
    """The model type of the family's config."""
    shapes: dict[str, list[Extent]] = Field(default_factory=dict)
    numbers: dict[str, dict[str, int | float | list[int]]] = Field(default_factory=dict)
    norms: dict[str, NormRecord] = Field(default_factory=dict)
    buffers: dict[str, list[Any] | float] = Field(default_factory=dict)
    """Those that no checkpoint stores."""


def held(module: nn.Module) -> dict[str, Any]:
    """Numbers and tuples of whole numbers that a module computes with."""
    return {**numbers_of(module), **whole_numbers(module)}


def record(model: PreTrainedModel) -> Record | str:
    """What a model of this config lacks; in words, where no record could say it."""
    stock = weightless(model.config, kind=type(model))
    others, kept = dict(stock.named_modules()), stored(model)
    shapes, numbers = dict[str, list[int]](), dict[str, dict[str, Any]]()
    norms, buffers = dict[str, NormRecord](), dict[str, Any]()
    for name, module in model.named_modules():
        other = others.get(name)
        if other is None:
            return f"'{name}' is in no model of the family"
        if isinstance(module, NormOver):
            norms[name] = _norm(module)
            continue
        if type(other) is not type(module):
            return f"'{name}' is another module than the family's"
        now, was = held(module), held(other)
        changed = {k: v for k, v in now.items() if k in was and was[k] != v}
        if changed:
            numbers[name] = {k: list(v) if type(v) is tuple else v for k, v in changed.items()}
        stem = f"{name}." if name else ""
        for k, p in other.named_parameters(recurse=False):
            mine = getattr(module, k)
            if mine is None:
                return f"'{stem}{k}' is gone"
            if mine.shape != p.shape:
                shapes[stem + k] = list(mine.shape)
        for k, b in other.named_buffers(recurse=False):
            mine = getattr(module, k)
            if stem + k in kept:
                if mine.shape != b.shape:
                    shapes[stem + k] = list(mine.shape)
            elif mine is None or mine.numel() > LARGEST:
                return f"the buffer '{stem}{k}' is too large for a config"
            elif not alike(b, mine):
                buffers[stem + k] = mine.tolist()
    return Record(
        family=model.config.model_type,
        shapes=shapes,
        numbers=numbers,
        norms=norms,
        buffers=buffers,
    )


def _norm(module: NormOver) -> NormRecord:
    weight, bias = module.weight, module.bias
    return NormRecord(
        of=int(module.of),
        centred=module.centred,
        eps=module.eps,
        weight=None if weight is None else len(weight),
        bias=None if bias is None else len(bias),
        offset=module.offset,
    )


def apply(model: PreTrainedModel, found: Record) -> None:
    """Gives a model of the family's config what the record says; new weights are random.

    Raises LookupError, AttributeError, TypeError or ValueError where the record speaks of what the model has not.
    """
    for name, norm in found.norms.items():
        owner, _, leaf = name.rpartition(".")
        getattr(model.get_submodule(owner), leaf)  # there must be one
        weight = None if norm.weight is None else torch.ones(norm.weight)
        bias = None if norm.bias is None else torch.zeros(norm.bias)
        made = NormOver(norm.of, norm.centred, norm.eps, weight, bias, norm.offset).requires_grad_(
            True
        )
        setattr(model.get_submodule(owner), leaf, made)
    for name, numbers in found.numbers.items():
        module = model.get_submodule(name)
        known = held(module)
        for k, v in numbers.items():
            if k not in known:
                raise AttributeError(f"{name} has no number '{k}'")
            value = tuple(v) if isinstance(v, list) else v
            if type(value) is not type(known[k]) or (
                isinstance(value, int) and value < 1 <= known[k]
            ):
                raise ValueError(f"{name}.{k} is {known[k]} in its family, and cannot be {v}")
            setattr(module, k, tuple(v) if isinstance(v, list) else v)
    named = stored(model)
    for name, shape in found.shapes.items():
        old = named[name]
        if old.dim() != len(shape) or any(a > b for a, b in zip(shape, old.shape, strict=True)):
            raise ValueError(f"{name} is {tuple(old.shape)} in its family, and {shape} is no part")
        _put(model, name, 0.02 * torch.randn(shape, dtype=old.dtype, device=old.device))
    fill_buffers(model, found)


def fill_buffers(model: nn.Module, found: Record) -> None:
    """The buffers that no checkpoint stores."""
    for name, values in found.buffers.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        old = module._buffers[leaf]
        if not isinstance(old, Tensor):
            raise AttributeError(f"{name} is no buffer")
        dtype = torch.promote_types(old.dtype, torch.float32) if old.is_floating_point() else None
        made = torch.tensor(values, dtype=dtype or old.dtype, device=old.device)
        module._buffers[leaf] = made


def _put(model: nn.Module, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._parameters:
        setattr(module, leaf, nn.Parameter(value))
    else:
        setattr(module, leaf, value)
