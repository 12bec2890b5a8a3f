"""Where weights come from: a skeleton without numbers, and each tensor when it is asked for."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ..core.cache import cache_dir
from ..core.errors import InputError
from ..core.sealed import read_kept_json, write_kept_json
from ..model.entry import check_model
from . import shards
from .folder import float_folder
from .keys import Part, accounted, parts
from .models import is_rounded, load_config, memory
from .shards import Stored
from .skeleton import aliases, set_buffer, skeleton, tensors, without_numbers
from .weights import check_format, check_keys

Names = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


class Source(Protocol):
    """The weights of a model, of which no more is in memory than what was asked for.

    ``skeleton`` is the family's own model, in eval mode: parameters on the meta device, buffers real, and tied as the
    weights are, which its config says too. ``names`` has the shape and the stored dtype of every tensor, by the model's
    own names (``named_parameters``, and buffers that checkpoints hold; these are filled already); a tied one has one
    name.
    """

    @property
    def config(self) -> PretrainedConfig: ...
    @property
    def skeleton(self) -> PreTrainedModel: ...
    @property
    def names(self) -> Names: ...
    @property
    def stored(self) -> torch.dtype:
        """The dtype of most of the numbers."""

    @property
    def nbytes(self) -> int:
        """Of all tensors as they are stored."""

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Copies on the CPU, in the stored dtype; finite, or InputError."""

    def rows(self, name: str, index: Tensor) -> Tensor:
        """Rows of a table; the rest of it stays where it is."""

    def digest(self) -> str:
        """A hash of all names, shapes, dtypes and numbers: the same for the same weights, wherever they lie."""


@dataclass(frozen=True)
class Files:
    """Weights in the safetensors files of one folder; ``ways`` says of each tensor what it is made of, and its name
    there."""

    model: str  # as messages call it
    config: PretrainedConfig
    skeleton: PreTrainedModel
    names: Names
    files: Mapping[str, Stored]
    ways: Mapping[str, tuple[Part, str]]
    checked: set[str] = field(default_factory=set)

    @property
    def stored(self) -> torch.dtype:
        return _most(self.names)

    @property
    def nbytes(self) -> int:
        return _bytes(self.names)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        read: dict[str, Tensor] = {}
        wanted = {n: self.ways[n] for n in names}
        for part in {id(part): part for part, _ in wanted.values()}.values():
            made = self._made(part)
            for name, (way, there) in wanted.items():
                if way is part:
                    read[name] = made[there]
                    self._check(name, made[there])
        return {n: read[n] for n in wanted}

    def _made(self, part: Part) -> dict[str, Tensor]:
        found = dict(shards.read(self.files[key] for key, _ in part.keys))
        return part.convert(found, self.skeleton)

    def _check(self, name: str, tensor: Tensor) -> None:
        """Once a tensor; files do not change while they are read."""
        if name not in self.checked:
            shards.check_finite(self.model, name, tensor)
            self.checked.add(name)

    def rows(self, name: str, index: Tensor) -> Tensor:
        part, _ = self.ways[name]
        if part.converter is not None:
            return self.read([name])[name][index]
        found = shards.rows(self.files[part.keys[0][0]], index)
        shards.check_finite(self.model, name, found)
        return found

    def digest(self) -> str:
        """Computed once for files of these names, sizes and times of change."""
        stats = {str(s.file.resolve()): s.file.stat() for s in self.files.values()}
        about = [(n, stat.st_size, stat.st_mtime_ns) for n, stat in sorted(stats.items())]
        key = hashlib.sha256(json.dumps([about, sorted(self.names)]).encode()).hexdigest()
        path = cache_dir("digests") / f"{key}.json"
        known = read_kept_json(path)
        if known is None:
            known = _digest(self)
            write_kept_json(path, known)
        return str(known)


@dataclass(frozen=True)
class Live:
    """Weights of a model in memory, which nobody changes meanwhile."""

    model: PreTrainedModel
    config: PretrainedConfig
    skeleton: PreTrainedModel

    @property
    def names(self) -> Names:
        return {n: (tuple(t.shape), t.dtype) for n, t in tensors(self.model).items()}

    @property
    def stored(self) -> torch.dtype:
        return _most(self.names)

    @property
    def nbytes(self) -> int:
        return _bytes(self.names)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        own = tensors(self.model)
        read = {n: own[n].detach().to("cpu", copy=True) for n in names}
        for name, tensor in read.items():
            shards.check_finite(type(self.model).__name__, name, tensor)
        return read

    def rows(self, name: str, index: Tensor) -> Tensor:
        table = tensors(self.model)[name].detach()
        return table[index.to(table.device)].cpu()

    def digest(self) -> str:
        return _digest(self)


def open_source(model: str, *, trust_remote_code: bool = False) -> Source:
    """The weights of a hub id, a folder, a GGUF file or packaged ones. Raises InputError.

    Checked from the headers alone: every tensor has its place and its shape; numbers are checked as they are read. GGUF
    files and rounded weights are read as a whole once, and kept as floating point in the cache.
    """
    folder = float_folder(model, trust_remote_code=trust_remote_code)
    config = load_config(
        str(folder) if is_rounded(model, trust_remote_code=trust_remote_code) else model,
        trust_remote_code=trust_remote_code,
    )
    check_format(model, folder, config)
    built = skeleton(config, folder, trust_remote_code=trust_remote_code)
    found = shards.stored(folder)
    names, ways = _matched(model, built, found)
    source = Files(model, config, built, names, found, ways)
    buffers = names.keys() & dict(built.named_buffers()).keys()
    for name, value in source.read(buffers).items():
        set_buffer(built, name, value)
    return source


def _matched(
    model: str, built: PreTrainedModel, found: Mapping[str, Stored]
) -> tuple[Names, dict[str, tuple[Part, str]]]:
    """Shape and dtype of each of the model's tensors, and what it is made of; every one accounted for."""
    own, first = tensors(built), aliases(built)
    made_of, unexpected = parts(built, found)
    names: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    ways: dict[str, tuple[Part, str]] = {}
    for part in made_of:
        blank = {
            k: torch.empty(found[k].shape, dtype=found[k].dtype, device="meta")
            for k, _ in part.keys
        }
        try:
            made = part.convert(blank, built)
        except Exception as e:  # each conversion fails in its own way
            raise InputError(
                f"{model}: {part.first} cannot be made of {', '.join(k for k, _ in part.keys[:5])}: "
                f"{' '.join(str(e).split())[:200]}. Save or download the checkpoint again."
            ) from None
        for there, tensor in made.items():
            name = first.get(there, there)
            if name in own:
                names[name], ways[name] = (tuple(tensor.shape), tensor.dtype), (part, there)
            else:
                unexpected.add(there)
    missing, unexpected = accounted(built, own.keys() - names.keys(), unexpected)
    shapes = {n: (shape, tuple(own[n].shape)) for n, (shape, _) in names.items()}
    odd = [(n, there, here) for n, (there, here) in shapes.items() if there != here]
    check_keys(
        model, {"missing_keys": missing, "unexpected_keys": unexpected, "mismatched_keys": odd}
    )
    return {n: names[n] for n in own if n in names}, ways


def live(model: nn.Module) -> Source:
    """The weights of a model in memory. Raises InputError for one whose weights are not its own, or not there."""
    whole = check_model(model)
    return Live(whole, whole.config, without_numbers(whole))


def _most(names: Names) -> torch.dtype:
    counted = Counter[torch.dtype]()
    for shape, dtype in names.values():
        counted[dtype] += math.prod(shape)
    return counted.most_common(1)[0][0]


def _bytes(names: Names) -> int:
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in names.values())


def _digest(source: Source) -> str:
    """One tensor at a time, in the order of their names."""
    made = hashlib.sha256()
    for name, (shape, dtype) in sorted(source.names.items()):
        made.update(f"{name} {shape} {dtype}\n".encode())
        made.update(memory(source.read([name])[name]))
    return made.hexdigest()
