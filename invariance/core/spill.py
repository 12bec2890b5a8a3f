"""Tensors by their keys, on disk beyond a share of memory."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Hashable, Iterator, Mapping, MutableMapping
from pathlib import Path

import torch
from torch import Tensor

LIMIT = 2**26  # bytes that stay in memory


class Spill(MutableMapping[Hashable, Tensor]):
    """What comes while ``limit`` bytes are held goes to a temporary file of its own, and back when it is asked for."""

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit, self.held = limit, 0
        self.kept: dict[Hashable, Tensor | tuple[Path, torch.Size, torch.dtype]] = {}
        self.folder: tempfile.TemporaryDirectory[str] | None = None
        self.written = 0

    def __setitem__(self, key: Hashable, x: Tensor) -> None:
        if key in self.kept:
            del self[key]
        if self.held + x.nbytes <= self.limit:
            self.held += x.nbytes
            self.kept[key] = x
            return
        self.folder = self.folder or tempfile.TemporaryDirectory(prefix="invariance-")
        self.written += 1
        path = Path(self.folder.name) / str(self.written)
        x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tofile(path)
        self.kept[key] = path, x.shape, x.dtype

    def __getitem__(self, key: Hashable) -> Tensor:
        found = self.kept[key]
        if isinstance(found, Tensor):
            return found
        path, shape, dtype = found
        raw = torch.empty(shape, dtype=dtype)
        with path.open("rb") as file:
            file.readinto(raw.view(-1).view(torch.uint8).numpy().data)
        return raw

    def __delitem__(self, key: Hashable) -> None:
        found = self.kept.pop(key)
        if isinstance(found, Tensor):
            self.held -= found.nbytes
        else:
            found[0].unlink()

    def __iter__(self) -> Iterator[Hashable]:
        return iter(self.kept)

    def __len__(self) -> int:
        return len(self.kept)


class Shared(Mapping[str, Tensor]):
    """Tensors by their names, of which several may stand for one; kept as by ``Spill``."""

    def __init__(self) -> None:
        self.kept, self.of = Spill(), dict[str, str]()

    def add(self, name: str, owner: str, make: Callable[[], Tensor]) -> None:
        """A name for the tensor of an owner, made when it is named first."""
        if owner not in self.kept:
            self.kept[owner] = make()
        self.of[name] = owner

    def __getitem__(self, name: str) -> Tensor:
        return self.kept[self.of[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.of)

    def __len__(self) -> int:
        return len(self.of)
