"""Norms of a stream of which coordinates go: they go on dividing by the width that was."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..derive.precision import Double, double
from ..derive.trace import Example, forward
from ..described.description import Flat, Kind
from ..described.weightless import stored
from .norms import Norm, NormOver, recognised
from .positions import Kept, Narrowing


def norms_of(
    model: nn.Module, flat: Flat, found: Sequence[Narrowing], kept: Kept, example: Example
) -> dict[str, tuple[Norm, str]]:
    """Modules that are norms over a space of which coordinates go, and that space."""
    modules, weights = dict(model.named_modules()), stored(model)
    made = dict[str, tuple[Norm, str]]()
    tried = set[str]()
    for n in found:
        owner = n.parameter.rpartition(".")[0]
        p = weights[n.parameter]
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
        with double(), Double():
            forward(model, example)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def renorm(
    model: nn.Module,
    name: str,
    found: tuple[Norm, str],
    flat: Flat,
    kept: Kept,
    narrowings: Sequence[Narrowing],
) -> bool:
    """Has a norm divide by its old width; whether another module had to take its place.

    √(Σx²/d + eps) = √(k/d) · √(Σx²/k + eps · d/k): a gain times √(d/k) and eps times d/k do it.
    """
    norm, _ = found
    module = model.get_submodule(name)
    if isinstance(module, NormOver):
        return True  # its width is said apart from those of its weights
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
