"""One real forward pass, read op by op: whatever Python does, ops are what counts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .arrays import unique_list
from .ids import Mark
from .precision import double, in_double
from .record import Record, weights_of
from .rules.algebra import freeze
from .rules.call import Call
from .rules.table import BLANKS, RULES

Example = Mapping[str, Any]  # keyword arguments of the model's forward
Refill = Callable[[nn.Module, int], None]  # gives a model other weights, by seed

_RESULTS = (
    "logits",
    "logits_per_image",
    "logits_per_text",
    "prediction_logits",
    "last_hidden_state",
)


class Trace(TorchDispatchMode):
    """Runs each op, then lets its rule read it. An op without a rule, or a rule that fails, freezes what it meets."""

    def __init__(self, record: Record) -> None:
        super().__init__()
        self.record = record

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, r = kwargs or {}, self.record
        name = func._schema.name.split("::")[1]
        inplace = name.endswith("_") and not name.startswith("__")
        tensors = tuple(tensors_in((*args, *kwargs.values())))
        before = tuple(r.get(a) for a in args) if inplace else None
        out = in_double(func, args, kwargs)
        op = name[:-1] if inplace else name
        r.ids.op = op
        if op not in BLANKS and not inplace and not any(map(r.known, tensors)):
            return out
        if isinstance(out, Tensor) and out.numel() == 0:
            return out  # an expert that no token reached: nothing was computed
        rule = RULES.get(name, RULES.get(op))
        call = Call(op, args, kwargs, out, before, tensors)
        if rule is None or (func._schema.is_mutable and not inplace):
            r.unknown[op] += 1
            rigid(r, call)
            return out
        try:
            rule(r, call)
        except Exception as error:  # a rule that does not fit narrows; it never guesses
            r.unknown[f"{op}: {type(error).__name__}: {str(error)[:60]}"] += 1
            rigid(r, call)
        return out


def rigid(r: Record, call: Call) -> None:
    """All that an op met stays as it is."""
    freeze(r, *(call.before or ()), *map(r.get, call.tensors))
    for out in call.outs:
        r.put(out, None)


def tensors_in(values: Iterable[Any]) -> Iterable[Tensor]:
    for v in values:
        if isinstance(v, Tensor):
            yield v
        elif isinstance(v, (list, tuple)):
            yield from tensors_in(v)


def results(output: Any) -> list[Tensor]:
    """What a model is for: its logits, else its hidden states, else every tensor that it returns."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        named = [output[k] for k in _RESULTS if isinstance(output.get(k), Tensor)]
        return named[:1] or list(tensors_in(output.values()))
    return list(tensors_in(output))[:1]


def forward(model: nn.Module, example: Example) -> list[Tensor]:
    return results(model(**example))


def trace(model: nn.Module, examples: Sequence[Example], refill: Refill | None = None) -> Record:
    """The record of the first pass that reached all weights; where none does, of all passes together.

    Passes after the first run on other weights, which send tokens elsewhere; the structure is the same. Where matrices
    turn out to be stacks of vectors, all is traced again with that known.
    """
    stacks: frozenset[str] = frozenset()
    while True:
        found: set[str] = set()
        before: tuple[str, ...] = ()
        alone = ([(seed, example)] for seed, example in enumerate(examples))
        for passes in (*alone, list(enumerate(examples))):
            r = Record(model, stacks)
            for seed, example in passes:
                traced_pass(model, r, example, seed, refill)
            found |= r.found_stacks
            left = unseen(model, r)
            if found - stacks or not left or not r.routers:
                break
            if left == before and not any(name in r.weights for name in left):
                break  # what no pass reaches is no expert
            before = left
        if found <= stacks:
            return r
        stacks |= found


def traced_pass(
    model: nn.Module, r: Record, example: Example, seed: int, refill: Refill | None
) -> None:
    kept = [p.detach().clone() for p in model.parameters()] if seed and refill is None else None
    if seed:
        (refill or random_weights)(model, seed)
    try:
        with double(), Trace(r):
            outputs = forward(model, example)
    finally:
        for p, q in zip(model.parameters(), kept or (), strict=False):
            p.data.copy_(q)
    r.ids.op = "output"
    freeze(r, *map(r.get, outputs))


def random_weights(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.dim() > 1:
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.data.copy_(noise / p.shape[-1] ** 0.5)


def unseen(model: nn.Module, r: Record) -> tuple[str, ...]:
    """Weights that no op used, or some of whose coordinates none saw (an expert that no token reached)."""
    used = {r.ids.root(a) for s in r.ids.sets.values() for a in s.tolist()}
    out = []
    for name, weight in weights_of(model).items():
        if not isinstance(weight, nn.Parameter):
            continue
        label = r.weights.get(name)
        if label is None:
            out.append(name)
            continue
        for f in label.fields[-1:]:
            if any(
                r.ids.root(a) not in used and not r.ids.marked(a, Mark.FROZEN)
                for a in unique_list(f)
            ):
                out.append(name)
    return tuple(sorted(out))
