"""A family's own model of which one part at a time is in memory: its layers one by one, rows of its tables."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from .architecture import Architecture
from .families import architecture
from .source import Source, on_meta, placed
from .vocabulary import factored, make_plain

CHUNK_BYTES = 2**23  # of a table, in the dtype to compute in
Logits = Callable[[Tensor], Tensor]


class Streamed:
    """Layers are filled when they are asked for, in ``dtype`` and on ``device``. The source stays as it is."""

    def __init__(
        self, source: Source, dtype: torch.dtype, device: str | torch.device = "cpu"
    ) -> None:
        self.source, self.dtype, self.device = source, dtype, torch.device(device)
        self.model = skeleton_in(dtype, source.skeleton, self.device)
        self.architecture = architecture(self.model.config)
        self.vocabulary = factored(self.model, self.architecture)
        if self.vocabulary is not None:
            make_plain(self.model, self.architecture)
        head = self.model.get_submodule(self.architecture.head)
        self.tied = head.weight is self.model.get_parameter(self.table)

    @property
    def table(self) -> str:
        """The name of the table that ids are looked up in."""
        return f"{self.architecture.embed[0]}.weight"

    @property
    def depth(self) -> int:
        return len(list(self.model.get_submodule(self.architecture.blocks).children()))

    def part(
        self, path: str, dtype: torch.dtype | None = None, within: Collection[str] | None = None
    ) -> nn.Module:
        """A copy of a module with its weights, ``within`` some of its own modules only.

        ``dtype`` is the least that they are given in: those stored in a finer one keep it.
        """
        module = own_copy(self.model.get_submodule(path))
        names = [
            n
            for n, p in _kept(module)
            if within is None or n.startswith(tuple(within))
            if p.is_meta
        ]
        found = self.source.read([f"{path}.{n}" for n in names])
        placed(module, {n: self._cast(found[f"{path}.{n}"], dtype) for n in names})
        return module

    def layer(self, i: int) -> nn.Module:
        """A layer of the family's own."""
        return self.part(f"{self.architecture.blocks}.{i}").to(self.dtype)

    def rows(self, name: str, index: Int[Tensor, " n"]) -> Tensor:
        return self._cast(self.source.rows(name, index), None)

    def _cast(self, value: Tensor, dtype: torch.dtype | None) -> Tensor:
        if not value.is_floating_point():
            return value.to(self.device)
        return value.to(self.device, torch.promote_types(value.dtype, dtype or self.dtype))

    @contextmanager
    def embedding(self, ids: Int[Tensor, "B T"]) -> Iterator[Int[Tensor, "B T"]]:
        """What looks these ids up, in the model; in place of them, the ids to look up."""
        with looked_up(self.model, self.architecture.embed, self.table_rows, ids) as places:
            yield places.to(self.device)

    def table_rows(self, name: str, index: Int[Tensor, " n"] | None) -> Tensor:
        """Rows of a table, or all of it."""
        if index is None:
            index = torch.arange(self.model.get_parameter(name).shape[0])
        tables = (self.table, f"{self.architecture.head}.weight")
        if self.vocabulary is not None and name in tables:
            return self._product_rows(name.removesuffix("weight"), index).to(self.dtype)
        return self.rows(name, index).to(self.dtype)

    def _product_rows(self, path: str, index: Int[Tensor, " n"]) -> Tensor:
        """Rows of a table of which the last ones are two factors."""
        assert self.vocabulary is not None
        rare = index >= self.vocabulary.common
        found = self.rows(f"{path}common", index.where(~rare, 0))
        basis = self.rows(f"{path}basis", torch.arange(self.vocabulary.rank))
        coordinates = self.rows(f"{path}rare", index[rare] - self.vocabulary.common)
        found[rare] = coordinates.to(self.dtype) @ basis.to(self.dtype)
        return found

    @property
    def head_rows(self) -> int:
        """How many rows of the head are in memory at a time."""
        width = self.model.get_parameter(self.table).shape[1]
        return max(CHUNK_BYTES // (width * self.dtype.itemsize), 1)

    def heads(self, step: int | None = None) -> Iterator[tuple[slice, Logits]]:
        """The head by rows of the vocabulary: which, and what gives their logits of a stream before the final norm.

        The family's own code computes them, whatever it does behind its layers.
        """
        path = self.architecture.final_norm
        norm = self.part(path).to(self.dtype)
        bias = self.model.get_submodule(self.architecture.head).bias
        name = self.table if self.tied else f"{self.architecture.head}.weight"
        vocabulary, step = len(self.model.get_parameter(name)), step or self.head_rows
        for first in range(0, vocabulary, step):
            rows = slice(first, min(first + step, vocabulary))
            index = torch.arange(rows.start, rows.stop)
            weight = self.table_rows(name, index)
            part = None
            if bias is not None:
                part = self.table_rows(f"{self.architecture.head}.bias", index)
            with ending(self.architecture, self.model, norm, weight, part) as logits:
                yield rows, logits


def skeleton_in(
    dtype: torch.dtype, skeleton: PreTrainedModel, device: torch.device
) -> PreTrainedModel:
    """A copy of a skeleton that computes in a dtype: parameters in it, buffers in it at least."""
    skeleton = copy.deepcopy(skeleton)
    for module in skeleton.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                wide = buffer.is_floating_point()
                to = torch.promote_types(buffer.dtype, dtype) if wide else buffer.dtype
                module._buffers[name] = buffer.to(device, to)
    made: dict[int, Any] = {id(p): on_meta(p, dtype) for p in skeleton.parameters()}
    for module in skeleton.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = made[id(parameter)]
        if isinstance(module, nn.Embedding):
            module.padding_idx = None  # says nothing but where no gradient goes
    skeleton.config._attn_implementation = "sdpa"
    return skeleton.eval()


def own_copy(module: nn.Module) -> Any:
    """A copy of a module that shares configs with it."""
    shared = {id(c): c for m in module.modules() if (c := vars(m).get("config")) is not None}
    return copy.deepcopy(module, shared)


def _kept(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a module that a checkpoint holds."""
    yield from module.named_parameters(remove_duplicate=False)
    kept = module.state_dict(keep_vars=True)
    yield from ((n, b) for n, b in module.named_buffers() if n in kept)


def chunks(rows: int, row_bytes: int) -> Iterator[slice]:
    """Runs of rows that take CHUNK_BYTES at most."""
    step = max(CHUNK_BYTES // max(row_bytes, 1), 1)
    for first in range(0, rows, step):
        yield slice(first, min(first + step, rows))


@contextmanager
def looked_up(
    model: PreTrainedModel,
    tables: tuple[str, ...],
    rows: Callable[[str, Int[Tensor, " n"] | None], Tensor],
    ids: Int[Tensor, "B T"],
) -> Iterator[Int[Tensor, "B T"]]:
    """Only the rows of these ids in the first table, which ids are numbered by then; all of the others."""
    found, places = ids.cpu().unique(return_inverse=True)
    modules = [model.get_submodule(name) for name in tables]
    before = [module.weight for module in modules]
    for n, (name, module) in enumerate(zip(tables, modules, strict=True)):
        placed(module, {"weight": rows(f"{name}.weight", None if n else found)})
    try:
        yield places
    finally:
        for module, weight in zip(modules, before, strict=True):
            module._parameters["weight"] = weight  # type: ignore[assignment]


class _Replay(nn.Module):
    """Stands for all layers, and gives what they are known to give."""

    stream: Tensor

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        return self.stream


@contextmanager
def ending(
    arch: Architecture, model: PreTrainedModel, norm: nn.Module, weight: Tensor, bias: Tensor | None
) -> Iterator[Logits]:
    """What a model's own code makes of the stream behind its layers, with a norm and some rows of a head."""
    replay = _Replay()
    paths = (arch.blocks, arch.final_norm, arch.head, *arch.embed)
    before = [model.get_submodule(path) for path in paths]
    head = nn.Linear(1, 1, bias=bias is not None, device="meta")
    placed(head, {"weight": weight} | ({} if bias is None else {"bias": bias}))
    model.set_submodule(arch.blocks, nn.ModuleList([replay]))
    model.set_submodule(arch.final_norm, norm)
    model.set_submodule(arch.head, head)
    tables = [own_copy(model.get_submodule(path)) for path in arch.embed]
    for path, table in zip(arch.embed, tables, strict=True):
        model.set_submodule(path, table)

    def logits(x: Tensor) -> Tensor:
        replay.stream = x
        for table in tables:  # what is looked up there is not used
            placed(table, {"weight": x.new_zeros(x.shape[1] + 8, 1)})
        ids = torch.zeros(x.shape[:2], dtype=torch.long, device=x.device)
        return model(input_ids=ids, use_cache=False).logits

    try:
        yield logits
    finally:
        for path, module in zip(paths, before, strict=True):
            model.set_submodule(path, module)
