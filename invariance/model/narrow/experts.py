"""Experts that go: what is left computes what the whole computes where their scores are minus infinity."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..described.description import Flat, Kind, Space
from ..described.weightless import stored
from .positions import Kept

PRODUCTS, COPY = ("aten::mm", "aten::addmm"), "aten::_to_copy"
PROBE = (1, 4)  # texts and tokens


def is_experts(name: str, space: Space) -> bool:
    """Whether a space's coordinates are experts any two of which can change places."""
    if space.kind is not Kind.SWAP or not name.startswith("experts"):
        return False
    together = list(range(space.width))
    for move in space.moves:
        if len(move) == 1:
            a, b = (together[c] for c in move[0])
            together = [a if t == b else t for t in together]
    return len(set(together)) == 1


class NeverChosen(TorchDispatchMode):
    """Routers give minus infinity to experts that are not kept; what is added to scores is minus infinity too."""

    def __init__(self, model: nn.Module, flat: Flat, kept: Kept):
        super().__init__()
        named = stored(model)
        self.routers: dict[int, Tensor] = {}  # by storage: which experts are gone
        self.copies: list[Tensor] = []  # of routers in another precision, whose storages must stay
        for name, stay in kept.items():
            space = flat.spaces[name]
            if not is_experts(name, space):
                continue
            gone = torch.from_numpy(np.setdiff1d(np.arange(space.width), stay))
            for a in flat.carrying(name):
                p = named[a.parameter]
                if p.numel() == space.width:
                    p.data.index_fill_(a.axis.dims[0], gone, -torch.inf)
                elif p.dim() == 2:
                    self.routers[p.untyped_storage()._cdata] = gone

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        for t in args if name in (*PRODUCTS, COPY) else ():
            gone = self.routers.get(t.untyped_storage()._cdata) if isinstance(t, Tensor) else None
            if gone is not None and name == COPY:
                self.routers[out.untyped_storage()._cdata] = gone
                self.copies.append(out)
            elif gone is not None:
                out[:, gone] = -torch.inf
        return out


class _Choices(TorchDispatchMode):
    """Notes of how many scores how many are taken. What Python asks of a number that is not there is 0."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name == "aten::topk":
            scores, k = args[:2]
            dim = args[2] if len(args) > 2 else -1
            size = scores.shape[dim]
            self.taken[size] = max(k, self.taken.get(size, 0))
        if name == "aten::_local_scalar_dense":
            return 0
        return func(*args, **(kwargs or {}))


def chosen(model: nn.Module) -> dict[int, int]:
    """How many experts a token takes, by how many there are, read off a model on meta up to where routing begins."""
    ids = torch.zeros(PROBE, dtype=torch.int64, device="meta")
    with torch.no_grad(), _Choices() as choices, suppress(Exception):  # meta tensors route nothing
        model(input_ids=ids, use_cache=False)
    return choices.taken
