"""Tokens enter a model: the embedding and all before the first block, by the family's own code."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, suppress
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..model.families import architecture
from .batch import Batch


class Enterable(Protocol):
    """A model that looks tokens up: all of it, or the rows that they need."""

    @property
    def model(self) -> PreTrainedModel: ...
    @property
    def device(self) -> torch.device: ...
    def embedding(self, ids: Tensor) -> AbstractContextManager[Tensor]: ...


class _Entered(Exception):
    """Raised where the last block would begin: what every block is called with is known then."""


class _Recorder(nn.Module):
    """Stands in a block's place, passes the stream on, and keeps what the block would have been called with."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.last = last
        self.called: tuple[Tensor, dict[str, Any]] | None = None

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        self.called = hidden_states, {k: v for k, v in kwargs.items() if k != "past_key_values"}
        if self.last:
            raise _Entered
        return hidden_states


@torch.no_grad()
def enter(
    parts: Enterable,
    batches: Iterable[tuple[Tensor, Tensor]],
    dtype: torch.dtype,
    stream: torch.dtype | None = None,
) -> list[Batch]:
    """Carry token batches (ids, mask) through the embedding, up to the first block; the model's own code does it.

    Branches compute in ``dtype``; the residual stream is kept in ``stream``, by default the same.
    """
    entered: list[Batch] = []
    model, path = parts.model, architecture(parts.model.config).blocks
    blocks = model.get_submodule(path)
    assert isinstance(blocks, nn.ModuleList)
    recorders = [_Recorder(last=n == len(blocks) - 1) for n in range(len(blocks))]
    model.set_submodule(path, nn.ModuleList(recorders))
    try:
        for ids, found in batches:
            mask = None if bool(found.all()) else found
            padded = None if mask is None else mask.long().to(parts.device)
            with parts.embedding(ids) as places, suppress(_Entered):
                model(input_ids=places, attention_mask=padded, use_cache=False)
            casts: dict[int, Tensor] = {}  # blocks share masks and angles; their casts too
            contexts = [_cast(r.called[1], dtype, casts) for r in recorders if r.called]
            assert recorders[0].called is not None
            entered.append(Batch(recorders[0].called[0].to(stream or dtype), contexts, mask))
    finally:
        model.set_submodule(path, blocks)
    return entered


def _cast(value: Any, dtype: torch.dtype, casts: dict[int, Tensor]) -> Any:
    """Floating-point tensors, wherever they lie in a value, in a dtype; each of them cast once."""
    if isinstance(value, Tensor):
        return casts.setdefault(id(value), value.to(dtype)) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {k: _cast(v, dtype, casts) for k, v in value.items()}
    return (
        type(value)(_cast(v, dtype, casts) for v in value)
        if isinstance(value, (tuple, list))
        else value
    )
