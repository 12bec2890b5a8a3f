"""Where changed weights go: into files as they are ready, or into a model in memory."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from filelock import FileLock, Timeout
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from ..core.errors import InputError
from ..core.files import write_json
from . import shards
from .clients import save_tokenizer
from .hub import quiet
from .join import join
from .journal import JOURNAL, SCRATCH, begin, note, resumed
from .shards import INDEX, SINGLE
from .skeleton import skeleton, tensors
from .weights import check_keys

LIMIT = 5 * 10**9  # bytes of a file, as save_pretrained has it
SMALL = LIMIT // 20  # smaller ones are put together


class Sink(Protocol):
    """Takes tensors by the names that the changed model gives them, each once, in any order; then what it is."""

    @property
    def finished(self) -> tuple[str, ...]:
        """The steps that an earlier run of the same work has done; what they wrote is there."""

    def write(self, tensors: Mapping[str, Tensor]) -> None: ...
    def done(self, step: str, needs: Iterable[Path] = ()) -> None:
        """A step is done: all that was written so far stands. ``needs`` are the files from which the next goes on."""

    def finish(
        self,
        config: PretrainedConfig,
        generation_config: GenerationConfig | None = None,
        tokenizer: Any | None = None,
    ) -> None:
        """All is written. Raises InputError if the config describes other tensors than those."""


@dataclass(frozen=True)
class Folder:
    """A checkpoint that becomes a folder in one step: until then it lies beside its place, with a journal.

    Work that was killed is taken up by ``open_folder`` with the same ``key``, at the last step of which every byte is
    still as it was. ``scratch`` is for files of one's own that the work needs to go on; it does not outlive it.
    """

    target: Path
    place: Path
    finished: tuple[str, ...]
    lock: FileLock
    parts: list[Path] = field(default_factory=list)
    fresh: list[Path] = field(default_factory=list)  # parts of the step that is being done

    @property
    def scratch(self) -> Path:
        return self.place / SCRATCH

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        for some in _pieces(tensors):
            path = self.place / f"part-{len(self.parts) + 1:05}.safetensors"
            save_file({n: t.contiguous() for n, t in some.items()}, path, {"format": "pt"})
            self.parts.append(path)
            self.fresh.append(path)

    def done(self, step: str, needs: Iterable[Path] = ()) -> None:
        note(self.place, step, self.fresh, needs)
        self.fresh.clear()

    def finish(
        self,
        config: PretrainedConfig,
        generation_config: GenerationConfig | None = None,
        tokenizer: Any | None = None,
    ) -> None:
        found = {s.key: s for part in self.parts for s in shards.header(part)}
        dtypes = [s.dtype for s in found.values()]
        model = _described(str(self.target), config, {n: s.shape for n, s in found.items()}, dtypes)
        files = self._named()
        if files != [self.place / SINGLE]:
            index = {s.key: file.name for file in files for s in shards.header(file)}
            size = sum(s.nbytes for s in found.values())
            write_json(self.place / INDEX, {"metadata": {"total_size": size}, "weight_map": index})
        with quiet():
            model.config.save_pretrained(self.place)
            if generation_config is not None:
                generation_config.save_pretrained(self.place)
            if tokenizer is not None:
                save_tokenizer(tokenizer, self.place)
        shutil.rmtree(self.scratch)
        (self.place / JOURNAL).unlink()
        self.lock.release()
        (self.place / "lock").unlink(missing_ok=True)
        if self.target.is_dir():
            self.target.rmdir()  # an empty one
        os.replace(self.place, self.target)

    def _named(self) -> list[Path]:
        """The files of the checkpoint, by the names that transformers looks for; small parts are put together."""
        groups, size = list[list[Path]](), {p: p.stat().st_size for p in self.parts}
        for part in self.parts:
            alone = sum(size.values()) > LIMIT and size[part] >= SMALL
            joins = groups and sum(size[p] for p in groups[-1]) + size[part] <= LIMIT
            if joins and not alone and (sum(size.values()) <= LIMIT or size[groups[-1][0]] < SMALL):
                groups[-1].append(part)
            else:
                groups.append([part])
        names = [f"model-{n:05}-of-{len(groups):05}.safetensors" for n in range(1, len(groups) + 1)]
        made = [self.place / name for name in (names if len(groups) > 1 else [SINGLE])]
        for group, path in zip(groups, made, strict=True):
            if len(group) == 1:
                os.replace(group[0], path)
            else:
                join(group, path)
                for part in group:
                    part.unlink()
        return made


def open_folder(target: Path, key: str = "") -> Folder:
    """A sink that writes a checkpoint at ``target``; ``key`` says all that the result depends on.

    Raises InputError where something is there already, or where another process writes.
    """
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise InputError(f"{target}: is there already. Name another folder, or remove this one.")
    place = target.parent / f".{target.name}.partial"
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(
            f"{target}: cannot be written here: {e.strerror}. Name another place."
        ) from None
    lock = FileLock(place / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(
            f"{target}: another process is writing it. Wait for it, or name another folder."
        ) from None
    steps = resumed(place, key)
    parts = [place / name for step in steps for name in step["parts"]]
    for path in place.glob("part-*"):
        if path not in parts:
            path.unlink()
    if not steps:
        shutil.rmtree(place / SCRATCH, ignore_errors=True)
    (place / SCRATCH).mkdir(exist_ok=True)
    begin(place, key, steps)
    return Folder(target, place, tuple(s["step"] for s in steps), lock, parts)


@dataclass
class Memory:
    """A model in memory: ``model``, once it is finished."""

    model: PreTrainedModel | None = None
    finished: tuple[str, ...] = ()
    held: dict[str, Tensor] = field(default_factory=dict)

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        self.held |= tensors

    def done(self, step: str, needs: Iterable[Path] = ()) -> None:
        pass

    def finish(
        self,
        config: PretrainedConfig,
        generation_config: GenerationConfig | None = None,
        tokenizer: Any | None = None,
    ) -> None:
        shapes = {n: tuple(t.shape) for n, t in self.held.items()}
        dtypes = [t.dtype for t in self.held.values()]
        model = _described("the changed model", config, shapes, dtypes)
        model.load_state_dict(self.held, strict=False, assign=True)
        model.tie_weights()
        if generation_config is not None:
            model.generation_config = copy.deepcopy(generation_config)
        self.model, self.held = model, {}


def _described(
    where: str,
    config: PretrainedConfig,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Iterable[torch.dtype],
) -> PreTrainedModel:
    """The model that a config describes, without numbers; its tensors are those that were written, or InputError."""
    model = skeleton(config)
    own = {n: tuple(t.shape) for n, t in tensors(model).items()}
    odd = [(n, shapes[n], own[n]) for n in own.keys() & shapes.keys() if shapes[n] != own[n]]
    check_keys(
        where,
        {
            "missing_keys": own.keys() - shapes.keys(),
            "unexpected_keys": shapes.keys() - own.keys(),
            "mismatched_keys": odd,
        },
    )
    floats = [d for d in dtypes if d.is_floating_point]
    model.config.architectures = [type(model).__name__]
    model.config.dtype = max(set(floats), key=floats.count)
    return model


def _pieces(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The tensors in runs of at most LIMIT bytes, or of one."""
    some: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if some and sum(t.nbytes for t in some.values()) + tensor.nbytes > LIMIT:
            yield some
            some = {}
        some[name] = tensor.detach().cpu()
    if some:
        yield some
