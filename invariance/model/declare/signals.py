"""The signals of one forward pass: what each module was given and what it gave."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..derive.precision import Double, double
from ..derive.trace import Example

CLOSE = 1e-9  # relative: sums of the same numbers in another order, in float64


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a module: its name, copies of the first tensors in and out, and its arguments as they were."""

    name: str
    module: nn.Module
    given: Tensor
    gave: Tensor
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    results: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Signals:
    """All calls of one pass, in the order in which they ended."""

    model: nn.Module
    ids: Tensor
    calls: Sequence[Call]

    def of(self, name: str) -> Call | None:
        """The last call of a module; None where it was not called."""
        return next((c for c in reversed(self.calls) if c.name == name), None)

    def under(self, path: str) -> list[Call]:
        """The calls of modules inside a module."""
        return [c for c in self.calls if c.name.startswith(f"{path}.")]


def signals(model: nn.Module, example: Example) -> Signals:
    """Run a model once, everything in float64."""
    calls: list[Call] = []

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given = next(tensors([*args, *kwargs.values()]), None)
            results = tuple(t.detach().clone() for t in tensors([output]))
            if given is not None and results:
                made = Call(name, module, given.detach().clone(), results[0], args, kwargs, results)
                calls.append(made)

        return hook

    handles = [
        module.register_forward_hook(note(name), with_kwargs=True)
        for name, module in model.named_modules()
        if name
    ]
    try:
        with double(), Double():
            model(**example)
    finally:
        for handle in handles:
            handle.remove()
    return Signals(model, example["input_ids"], calls)


def tensors(values: Any) -> Iterator[Tensor]:
    """Tensors in nested lists, in order."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors(value)


def same(x: Tensor, y: Tensor) -> bool:
    """Whether two signals are one, to the rounding of sums; sequences may have been joined."""
    if x.shape[-1] != y.shape[-1] or x.numel() != y.numel():
        return False
    difference = x - y.reshape(x.shape)
    return bool(difference.norm() <= CLOSE * torch.maximum(x.norm(), y.norm()))


def replayed(call: Call, reader: nn.Module, writer: nn.Module) -> tuple[bool, bool]:
    """Whether the writer's input moves, at the first token and at later ones, when the reader's output does at the first."""
    seen: list[Tensor] = []

    def change(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        moved = output.clone()
        moved[:, 0] += torch.arange(moved.shape[-1]).sin()  # no norm takes it out
        return moved

    def keep(module: nn.Module, args: Any) -> None:
        seen.append(args[0].detach().clone())

    watching = writer.register_forward_pre_hook(keep)
    try:
        with double(), Double():
            call.module(*call.args, **call.kwargs)
            changing = reader.register_forward_hook(change)
            try:
                call.module(*call.args, **call.kwargs)
            finally:
                changing.remove()
    finally:
        watching.remove()
    before, after = seen
    return not same(before[:, 0], after[:, 0]), not same(before[:, 1:], after[:, 1:])
