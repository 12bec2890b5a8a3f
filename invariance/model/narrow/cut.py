"""Coordinates of spaces cut out of a model in place: the modules stay the family's own, only narrower.

A cut computes what the model computes whose coordinates are zero: norms go on dividing by the old width. It is tried on
an input before it counts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..derive.trace import Example, forward
from ..described.description import Description, Flat, Kind
from ..described.elements import blocks
from ..described.weightless import on_meta
from .attributes import extents, moved, note
from .norms import Norm, NormOver, recognised
from .positions import Kept, Narrowing, narrowed, narrowings, shapes, zeroed
from .spoken import Change, Spoken, spoken
from .stock import speak


@dataclass(frozen=True)
class Cut:
    """What a cut did. ``changes``: what the config says of it; empty where it cannot say it.

    ``replaced``: modules that the family's own class could not be.
    """

    narrowed: tuple[Narrowing, ...] = field(repr=False)
    changes: tuple[Change, ...]
    replaced: tuple[str, ...]


def zero(model: nn.Module, description: Description, kept: Kept) -> None:
    """All that a cut would delete becomes zero: gains of norms too, so that nothing comes out there."""
    flat, named = description.flat(), dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for n in narrowings(description, model, kept):
            gain = flat.gains.get(n.parameter)
            value = zeroed(named[n.parameter], n, -gain.offset if gain is not None else 0.0)
            named[n.parameter].copy_(value)


def cut(model: PreTrainedModel, description: Description, kept: Kept, example: Example) -> Cut:
    """Deletes what is not kept, in place. ``example``: an input, to see which modules are norms of what."""
    flat, config = description.flat(), model.config
    found = narrowings(description, model, kept)
    was, target = shapes(model, []), shapes(model, found)
    base = on_meta(config, type(model))
    said = spoken(config, base, target)
    norms = _norms(model, flat, found, kept, example)
    known = extents([model, base] if said is None else [model, base, said.model])
    _narrow(model, found)
    replaced = [
        name for name, norm in norms.items() if _renorm(model, name, norm, flat, kept, found)
    ]
    note(model, was, known)
    if said is not None:
        _adopt(model, base, said, flat, kept)
        speak(model)
    return Cut(tuple(found), () if said is None else said.changes, tuple(replaced))


def _narrow(model: nn.Module, found: list[Narrowing]) -> None:
    named = dict(model.named_parameters(remove_duplicate=False))
    done = set[tuple[int, int]]()
    for n in found:
        p = named[n.parameter]
        if (id(p), n.dim) not in done:
            done.add((id(p), n.dim))
            p.data = narrowed(p.data, n)


def _adopt(model: PreTrainedModel, base: nn.Module, said: Spoken, flat: Flat, kept: Kept) -> None:
    """The config and the whole numbers that modules hold, as a model of the new config has them."""
    for change in said.changes:
        setattr(change.key.holder(model.config), change.key.name, change.value)
    modules = dict(model.named_modules())
    for (name, attribute), (_, value) in moved(base, said.model).items():
        setattr(modules[name], attribute, value)
    now = dict(said.model.named_buffers())
    for name, buffer in base.named_buffers():
        if name in now and now[name].shape != buffer.shape:
            for d, (o, n) in enumerate(zip(buffer.shape, now[name].shape, strict=True)):
                if o != n:
                    narrow_buffer(model, name, d, stay(o, n, flat, kept))


def narrow_buffer(model: nn.Module, name: str, dim: int, index: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    held = getattr(module, leaf)
    if held is not None:
        setattr(module, leaf, held.index_select(dim, index))


def stay(was: int, now: int, flat: Flat, kept: Kept) -> Tensor:
    """What stays of a buffer: as of the space of its width, or of the pairs of the first head."""
    for name, codes in kept.items():
        space = flat.spaces[name]
        if space.width == was and len(codes) == now:
            return torch.from_numpy(np.sort(codes))
        if space.kind is Kind.C:
            pairs = np.isin(blocks(space)[:was, 0], codes)
            if len(pairs) == was and pairs.sum() == now:
                return torch.from_numpy(np.flatnonzero(pairs))
    return torch.arange(now)


# ---- norms


def _norms(
    model: nn.Module, flat: Flat, found: list[Narrowing], kept: Kept, example: Example
) -> dict[str, tuple[Norm, str]]:
    """Modules that are norms over a space of which coordinates go, and that space."""
    modules = dict(model.named_modules())
    made = dict[str, tuple[Norm, str]]()
    tried = set[str]()
    for n in found:
        owner = n.parameter.rpartition(".")[0]
        p = modules[owner].get_parameter(n.parameter.rpartition(".")[2])
        if p.dim() == 1 and owner not in tried:
            tried.add(owner)
            norm = recognised(modules[owner], p.shape[0])
            if norm is not None:
                made[owner] = norm, n.space
    widths = {
        flat.spaces[name].width: name for name in kept if flat.spaces[name].kind is not Kind.SWAP
    }
    for name, width in _bare_widths(model, example).items():
        if width in widths:
            norm = recognised(modules[name], width)
            if norm is not None:
                made[name] = norm, widths[width]
    return made


def _bare_widths(model: nn.Module, example: Example) -> dict[str, int]:
    """The width of what goes into each module that has neither parameters nor modules in it."""
    seen, hooks = dict[str, int](), list[Any]()

    def see(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor) and args[0].dim():
                seen[name] = args[0].shape[-1]

        return hook

    for name, module in model.named_modules():
        if not list(module.children()) and not list(module.parameters()):
            hooks.append(module.register_forward_pre_hook(see(name)))
    try:
        with torch.no_grad():
            forward(model, example)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _renorm(
    model: nn.Module,
    name: str,
    found: tuple[Norm, str],
    flat: Flat,
    kept: Kept,
    narrowings: list[Narrowing],
) -> bool:
    """Has a norm divide by its old width; whether another module had to take its place.

    √(Σx²/d + eps) = √(k/d) · √(Σx²/k + eps · d/k): a gain times √(d/k) and eps times d/k do it.
    """
    norm, _ = found
    module = model.get_submodule(name)
    own = dict(module.named_parameters(recurse=False))
    mine = [n for n in narrowings if n.parameter.rpartition(".")[0] == name and n.dims == (0,)]
    stay = torch.from_numpy(mine[0].stay) if mine else None
    gain = norm.gain if stay is None else norm.gain[stay]
    bias = norm.bias if stay is None else norm.bias[stay]
    d, k = _widths(norm, flat, kept, found[1], stay)
    if not norm.centred and norm.held is not None and len(own) == 1 and stay is not None:
        (p,) = own.values()
        offset = gain - p.detach().double()
        with torch.no_grad():
            p.copy_((gain * (d / k) ** 0.5 - offset).to(p.dtype))
        setattr(module, norm.held, norm.eps * d / k)
        return False
    dtype = next(model.parameters()).dtype
    weight = gain.to(dtype) if own else None
    other = bias.to(dtype) if len(own) > 1 else None
    made = NormOver(d, norm.centred, norm.eps, weight, other).train(module.training)
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, made)
    return True


def _widths(norm: Norm, flat: Flat, kept: Kept, space: str, stay: Tensor | None) -> tuple[int, int]:
    if stay is not None:
        return len(norm.gain), len(stay)
    return flat.spaces[space].width, len(kept[space])
