"""Moments tapped at the parameters that read a space: whatever a family's modules do, a matrix product reads a weight."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..model.described.description import Flat, FlatAxis
from ..model.described.elements import blocks
from ..model.described.turn import occurrences, positions
from ..model.described.weightless import stored
from .moment import Moment
from .outer import add_outer

PRODUCTS = {"aten::mm": 0, "aten::addmm": 1, "aten::bmm": 0, "aten::baddbmm": 1}  # first factor
Reader = tuple[str, tuple[int, ...]]  # a parameter and the dims of its axis that is contracted


@dataclass(frozen=True)
class Places:
    """Where a space lies on one axis: of each occurrence, [copies, size] positions."""

    axis: FlatAxis
    at: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Seen:
    """What was read of one space: per reader, and what all readers of the stream's writers saw together.

    ``moments``: [copies, size, size] sums of x xᵀ by reader; ``counts``: rows that each copy saw.
    """

    moments: dict[Reader, Tensor] = field(default_factory=dict)
    counts: dict[Reader, Tensor] = field(default_factory=dict)
    readers: set[Reader] = field(
        default_factory=set
    )  # all, those of a signal that was counted before too

    def total(self, readers: list[Reader]) -> Moment:
        """The moment of several readers together; the count is that of the rows of one reader, of all copies."""
        chosen = [r for r in readers if r in self.moments] or list(self.moments)
        rows = max(float(self.counts[r].sum()) for r in chosen)
        return Moment(sum(self.moments[r] for r in chosen), rows)  # type: ignore[arg-type]


Found = tuple[Reader, Places]


def places(flat: Flat, space: str) -> Iterator[Found]:
    """Every axis of a matrix that carries a space, and where."""
    own = flat.spaces[space]
    for a in flat.carrying(space):
        for label in a.axis.labels:
            for at, codes in positions(a, label, {space}).values():
                if len(codes) % own.width == 0:
                    each = tuple(o[blocks(own)] for o in occurrences(at, codes, own.width))
                    yield (a.parameter, a.axis.dims), Places(a, each)


class Tap(TorchDispatchMode):
    """Adds up x xᵀ of what is multiplied into the axes that carry some spaces.

    ``once``: spaces that many weights read side by side; one signal counts once for them. ``rows`` keeps some of the
    rows of signals that have one a token (a mask, flat); others are routed, and count whole.
    """

    def __init__(
        self, model: nn.Module, spaces: Mapping[str, Iterable[Found]], once: frozenset[str]
    ):
        super().__init__()
        self.once = once
        self.params = stored(model)
        self.of = {p.untyped_storage()._cdata: name for name, p in self.params.items()}
        self.places: dict[str, list[tuple[str, Reader, Places]]] = {}
        for space, where in spaces.items():
            for reader, found in where:
                self.places.setdefault(reader[0], []).append((space, reader, found))
        self.seen = {space: Seen() for space in spaces}
        self.last: dict[str, Tensor] = {}
        self.rows: Tensor | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = PRODUCTS.get(func._schema.name)
        if first is not None:
            a, b = args[first], args[first + 1]
            for x, w, left in ((a, b, False), (b, a, True)):
                name = self.of.get(w.untyped_storage()._cdata)
                if name in self.places:
                    assert name is not None
                    self._read(name, w, x, left)
        return func(*args, **(kwargs or {}))

    def _read(self, name: str, w: Tensor, x: Tensor, left: bool) -> None:
        """One product: ``w`` is a view of a parameter, ``x`` what it was multiplied with, from which side."""
        p = self.params[name]
        contracted = w.dim() - 1 if left else w.dim() - 2
        signal = x.mT if left else x  # [..., n, contracted]
        same = [d for d in range(p.dim()) if p.stride(d) == w.stride(contracted) and p.shape[d] > 1]
        if not same:
            return
        dim, offset = same[0], w.storage_offset() - p.storage_offset()
        stacked = p.dim() == 3 and dim > 0
        size = p.stride(0) if stacked else p.numel()
        start = offset % size // p.stride(dim) % p.shape[dim]
        window = np.arange(start, start + w.shape[contracted])
        if stacked and w.dim() == 3:
            for e in range(w.shape[0]):
                self._take(name, dim, window + (offset // size + e) * p.shape[dim], signal[e])
        else:
            flat = signal.reshape(-1, signal.shape[-1]) if signal.dim() == 3 else signal
            self._take(name, dim, window + (offset // size if stacked else 0) * p.shape[dim], flat)

    def _take(self, name: str, dim: int, at: np.ndarray, x: Tensor) -> None:
        if not len(x):
            return
        rows = x if self.rows is None or len(self.rows) != len(x) else x[self.rows]
        for space, reader, found in self.places[name]:
            if reader[1][-1] != dim:
                continue
            seen = self.seen[space]
            seen.readers.add(reader)
            if space in self.once and self._again(space, x):
                continue
            for each in found.at:
                copies, size = each.shape
                moment = seen.moments.setdefault(
                    reader, torch.zeros(copies, size, size, dtype=torch.float64)
                )
                counts = seen.counts.setdefault(reader, torch.zeros(copies, dtype=torch.float64))
                for c in range(copies):
                    index = each[c] - at[0]
                    if ((index >= 0) & (index < len(at))).all():
                        own = rows[:, torch.from_numpy(index).to(rows.device)]
                        add_outer(own[None], moment[c : c + 1])
                        counts[c] += len(own)

    def _again(self, space: str, x: Tensor) -> bool:
        """Whether a signal is the one that was just read."""
        last = self.last.get(space)
        self.last[space] = x
        return last is not None and last.data_ptr() == x.data_ptr() and last.shape == x.shape


def tapped(
    model: nn.Module,
    spaces: Mapping[str, Iterable[Found]],
    once: frozenset[str],
    batches: Iterator[tuple[Tensor, Tensor]],
    skip: int = 0,
    beside: AbstractContextManager[Any] = nullcontext(),
) -> Mapping[str, Seen]:
    """What is read of spaces while batches of (ids, mask) pass a model; the first ``skip`` tokens pass unmeasured.

    ``spaces``: where each lies on which matrices, as ``places`` says.
    ``beside``: another mode that watches the same passes.
    """
    tap = Tap(model, spaces, once)
    device = next(model.parameters()).device
    for ids, mask in batches:
        keep = mask.clone()
        keep[:, :skip] = False
        tap.rows = None if bool(keep.all()) else keep.flatten().to(device)
        padded = {} if bool(mask.all()) else {"attention_mask": mask.to(device).long()}
        with torch.no_grad(), tap, beside:
            model(input_ids=ids.to(device), use_cache=False, **padded)
    return tap.seen
