"""Models of real width whose weights take no memory: on meta, or filled from one random vector each."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig, PreTrainedModel

LARGE = 10**6  # elements of a tensor that is made on meta at once
SLICE = 7  # how far a stack's slices are apart in their vector


Class = type[PreTrainedModel]
OPTIONS: tuple[dict[str, str], ...] = (
    {"attn_implementation": "eager", "experts_implementation": "eager"},
    {"attn_implementation": "eager"},
    {},
)


def plain(config: PretrainedConfig, kind: Class | None = None) -> PreTrainedModel:
    """The model of a config (of this class, else the causal one) whose attention and experts are plain ops."""
    make: Any = transformers.AutoModelForCausalLM.from_config if kind is None else kind._from_config
    for options in OPTIONS:
        try:
            made = make(copy.deepcopy(config), **options)  # which notes its options in the config
            break
        except (ValueError, TypeError):
            if not options:
                raise
    assert isinstance(made, PreTrainedModel)
    return made


def on_meta(config: PretrainedConfig, kind: Class | None = None) -> PreTrainedModel:
    """The model of a config, without weights or buffers."""
    with torch.device("meta"):
        return plain(config, kind)


def weightless(
    config: PretrainedConfig, seed: int = 0, kind: Class | None = None
) -> PreTrainedModel:
    """The model of a config in float64 with real buffers, on weights that take no memory."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _parameters_on_meta():
            model = plain(config, kind)
        fill(model, seed)
    finally:
        torch.set_default_dtype(before)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point():
                setattr(module, name, buffer.double())
    return model.eval()


def stored(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint stores, by each of its names: parameters, and buffers such as a router's corrections."""
    held = model.state_dict(keep_vars=True).items()
    return {name: t for name, t in held if t.is_floating_point()}


def fill(model: nn.Module, seed: int) -> None:
    """Other weights, by seed. Tied weights are no longer tied."""
    for i, (name, p) in enumerate(stored(model).items()):
        owner, _, leaf = name.rpartition(".")
        value = weights(tuple(p.shape), 1000 * seed + i)
        if isinstance(p, nn.Parameter):
            setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
        elif not bool((p != 0).any()):  # a buffer that waits to be trained
            setattr(model.get_submodule(owner), leaf, value)


def refill(model: nn.Module, seed: int) -> None:
    """Other weights in the same parameters."""
    for i, p in enumerate(model.parameters()):
        p.data = weights(tuple(p.shape), 1000 * seed + i)


def weights(shape: tuple[int, ...], seed: int) -> Tensor:
    """A random matrix in the memory of a vector: w[i, j] = r[i + j], scaled by 1/√columns."""
    generator = torch.Generator().manual_seed(seed)
    if len(shape) < 2:
        return 1 + 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    strides = [SLICE, *[1] * (len(shape) - 1)] if len(shape) > 2 else [1, 1]
    n = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    r = torch.randn(n, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5
    return r.as_strided(shape, strides)


class _LargeOnMeta(TorchFunctionMode):
    """Large tensors made empty are made on meta: they would become parameters."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and not kwargs.get("device"):
            size = (
                args[0] if args and isinstance(args[0], (tuple, list)) else kwargs.get("size", args)
            )
            if torch.Size(size).numel() > LARGE:
                kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules made inside have parameters on meta and real buffers."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, p: nn.Parameter | None) -> None:
        empty = None if p is None else nn.Parameter(torch.empty_like(p, device="meta"), False)
        register(module, name, empty)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        with _LargeOnMeta():
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
