"""The canonical model that a run works on: all of it, or a skeleton of which a stage or two are in memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..core.change import Change
from ..core.memory import trim
from .axes import Edge
from .canonical import canonicalize
from .folding import assign, centre_stage, centred, fold_norm, fold_stage
from .layout import Layout
from .modules import Block, Factored, Norm, Stage
from .reparametrize import along, contract, renumber, reparametrize, slots
from .source import Source, emptied
from .streamed import Logits, Streamed, chunks, ending, looked_up, own_copy
from .vocabulary import Head


class Stages(ABC):
    """A canonical model whose stages can be had one by one, to be measured and to be changed."""

    model: PreTrainedModel
    layout: Layout
    device: torch.device

    @abstractmethod
    def embedding(self, ids: Int[Tensor, "B T"]) -> AbstractContextManager[Int[Tensor, "B T"]]:
        """What looks these ids up, in the model; in place of them, the ids to look up."""

    @abstractmethod
    def stage(self, edge: Edge, dtype: torch.dtype) -> Stage:
        """A copy of a stage as it stands now, in a dtype."""

    @abstractmethod
    def peek(self, edge: Edge, linears: Collection[str]) -> Stage:
        """A stage to look at some linear layers of it, as they stand now; the others may be empty."""

    @abstractmethod
    def hold(self, edge: Edge) -> Stage:
        """A stage in the model, with its weights there, to be changed."""

    @abstractmethod
    def change(self, changes: Mapping[str, Change], edges: Collection[Edge]) -> None:
        """Change spaces where these stages, which are held, meet them."""

    @abstractmethod
    def heads(self, dtype: torch.dtype) -> Iterator[tuple[slice, Logits]]:
        """The head by rows of the vocabulary: which, and what gives their logits of a stream before the final norm."""

    @abstractmethod
    def end(self, name: str) -> Iterator[Tensor]:
        """The rows of a weight behind the stages, which may come in parts."""

    @abstractmethod
    def change_ends(self, changes: Mapping[str, Change]) -> None:
        """Change the points of the stream where tables and the head meet them; each of them once."""


class Whole(Stages):
    """A model that is in memory with all that it has."""

    def __init__(self, model: PreTrainedModel, layout: Layout) -> None:
        self.model, self.layout, self.device = model, layout, model.device

    def embedding(self, ids: Int[Tensor, "B T"]) -> AbstractContextManager[Int[Tensor, "B T"]]:
        return nullcontext(ids.to(self.device))

    def stage(self, edge: Edge, dtype: torch.dtype) -> Stage:
        found: Stage = own_copy(self.model.get_submodule(edge.stage)).to(dtype)
        return found

    def peek(self, edge: Edge, linears: Collection[str]) -> Stage:
        return self.hold(edge)

    def hold(self, edge: Edge) -> Stage:
        found = self.model.get_submodule(edge.stage)
        assert isinstance(found, Stage)
        return found

    def change(self, changes: Mapping[str, Change], edges: Collection[Edge]) -> None:
        reparametrize(self.model, self.layout, changes)

    def change_ends(self, changes: Mapping[str, Change]) -> None:
        """Nothing: ``change`` has changed them too."""

    def end(self, name: str) -> Iterator[Tensor]:
        yield self.model.get_parameter(name).detach().double()

    def heads(self, dtype: torch.dtype) -> Iterator[tuple[slice, Logits]]:
        arch = self.layout.architecture
        head = self.model.get_submodule(arch.head)
        assert isinstance(head, nn.Linear | Head)
        norm = own_copy(self.model.get_submodule(arch.final_norm)).to(dtype)
        weight = head.weight.detach().to(dtype)
        bias = None if head.bias is None else head.bias.detach().to(dtype)
        with ending(arch, self.model, norm, weight, bias) as logits:
            yield slice(0, len(weight)), logits


class Working(Stages):
    """A canonical skeleton in float64, filled stage by stage from a source, which stays as it is."""

    def __init__(
        self,
        source: Source,
        *,
        fold: bool = False,
        tie: str = "untie",
        split: Collection[str] = (),
        device: str | torch.device = "cpu",
    ) -> None:
        self.source, self.tie = source, tie
        self.parts = Streamed(source, torch.float64, device)
        self.device, self.architecture = self.parts.device, self.parts.architecture
        self.model = Streamed(source, torch.float64, device).model
        plain = canonicalize(self.model, fold=False)
        self.layout = canonicalize(self.model, fold=fold, tie=tie, split=split)
        self.folds = self.layout.folded and not plain.folded
        self.centres = self.folds and plain.centred
        self.slots = slots(self.model, self.layout)
        self.held: set[str] = set()
        self.changes: dict[str, Change] = {}  # of the two ends of the stream
        self.model.set_submodule(self.architecture.final_norm, self._final())

    # --- Stages.

    def stage(self, edge: Edge, dtype: torch.dtype) -> Stage:
        if edge.stage in self.held:
            found: Stage = own_copy(self.model.get_submodule(edge.stage)).to(dtype)
            return found
        return self._dense(edge, dtype)

    def peek(self, edge: Edge, linears: Collection[str]) -> Stage:
        if edge.stage in self.held:
            return self.hold(edge)
        return self._dense(edge, torch.float64, linears)

    def hold(self, edge: Edge) -> Stage:
        if edge.stage not in self.held:
            self.model.set_submodule(edge.stage, self._dense(edge, torch.float64))
            self.held.add(edge.stage)
        found = self.model.get_submodule(edge.stage)
        assert isinstance(found, Stage)
        return found

    def free(self, edge: Edge) -> None:
        """Take a stage's weights out of the model; their shapes stay. It cannot be held again."""
        emptied(self.model.get_submodule(edge.stage))
        trim()

    @torch.no_grad()
    def change(self, changes: Mapping[str, Change], edges: Collection[Edge]) -> None:
        reparametrize(self.model, self.layout, changes, tuple(f"{e.stage}." for e in edges))

    @torch.no_grad()
    def change_ends(self, changes: Mapping[str, Change]) -> None:
        first, last = self.layout.points[0], self.layout.points[-1]
        ends = {p: changes[p] for p in (first, last) if p in changes}
        mix = f"{self.architecture.final_norm}.1.weight"
        for i, axis in enumerate(self.layout.axes.get(mix, ())):
            if axis is not None and axis.space in ends:
                W = self.model.get_parameter(mix)
                assign(self.model, mix, contract(W, i, axis, ends[axis.space]))
        self.changes |= ends

    def _dense(
        self, edge: Edge, dtype: torch.dtype, linears: Collection[str] | None = None
    ) -> Stage:
        """A stage of the dense model in canonical form, with all or some of its linear layers. Each weight is rounded
        once, to the dtype."""
        number = edge.number
        path = f"{self.architecture.blocks}.{edge.block}"
        if isinstance(self.parts.model.get_submodule(path), Block):
            within = [f"stages.{number}."]
            stage = self.parts.part(path, dtype, within).get_submodule(f"stages.{number}")
        else:
            declared = self.architecture.stages[number]
            names = declared.names()
            if linears is not None:
                asked = {n.removesuffix(".first").removesuffix(".second") for n in linears}
                names = {n: t for n, t in names.items() if n in {*asked, "norm"}}
            within = [f"{name}." for name in names.values()]
            layer = self.parts.part(path, dtype, within)
            stage = self.architecture.stage_of(layer, declared, self.parts.model.config)
        assert isinstance(stage, Stage)
        for name, module in self.model.get_submodule(edge.stage).named_modules():
            if isinstance(module, Factored):
                linear = stage.get_submodule(name)
                if isinstance(linear, nn.Linear):
                    stage.set_submodule(name, Factored.split(linear))
        if self.folds:
            with torch.no_grad():
                fold_stage(stage)
                if self.centres:
                    centre_stage(stage)
        return stage.to(dtype) if linears is None else stage

    # --- What stands before and behind the stages.

    def embedding(self, ids: Int[Tensor, "B T"]) -> AbstractContextManager[Int[Tensor, "B T"]]:
        return self._embedding(ids)

    @contextmanager
    def _embedding(self, ids: Int[Tensor, "B T"]) -> Iterator[Int[Tensor, "B T"]]:
        with looked_up(self.model, self.architecture.embed, self.table, ids) as places:
            yield places.to(self.device)

    def table(self, name: str, index: Int[Tensor, " n"] | None = None) -> Tensor:
        """Rows of a table that writes the stream, or all of it, as changed by now."""
        W = self.parts.table_rows(name, index)
        return self._changed(name, centred(W, 1) if self.centres else W)

    def head(self, index: Int[Tensor, " n"]) -> nn.Linear:
        """Some rows of the head, as changed by now."""
        name = self.architecture.head
        reader = nn.Linear(1, 1, bias=False, device="meta")
        if self.layout.tied:
            reader.weight = nn.Parameter(self.table(self.parts.table, index))
        else:
            theirs = self.parts.table if self.parts.tied else f"{name}.weight"
            reader.weight = nn.Parameter(self.parts.table_rows(theirs, index))
        if self.parts.model.get_submodule(name).bias is not None:
            reader.bias = nn.Parameter(self.parts.table_rows(f"{name}.bias", index))
        if self.layout.tied:
            return reader
        if self.folds:
            fold_norm(own_copy(self.closing), [reader])
        reader.weight = nn.Parameter(self._changed(f"{name}.weight", reader.weight.detach()))
        return reader

    def end(self, name: str) -> Iterator[Tensor]:
        parameter = self.model.get_parameter(name)
        if not parameter.is_meta:
            yield parameter.detach()
            return
        for rows in chunks(len(parameter), parameter[:1].nbytes):
            yield self.head(torch.arange(rows.start, rows.stop)).weight.detach()

    def heads(self, dtype: torch.dtype = torch.float64) -> Iterator[tuple[slice, Logits]]:
        vocabulary, width = self.parts.model.get_parameter(self.parts.table).shape
        norm = own_copy(self.model.get_submodule(self.architecture.final_norm)).to(dtype)
        for rows in chunks(vocabulary, width * torch.float64.itemsize):
            reader = self.head(torch.arange(rows.start, rows.stop))
            bias = None if reader.bias is None else reader.bias.detach().to(dtype)
            weight = reader.weight.detach().to(dtype)
            with ending(self.architecture, self.model, norm, weight, bias) as logits:
                yield rows, logits

    @torch.no_grad()
    def settle(self) -> PreTrainedModel:
        """Have the tables and the head in the model too, which is whole where all its stages are held."""
        head = self.architecture.head
        vocabulary = self.parts.model.get_parameter(self.parts.table).shape[0]
        for name in self.architecture.embed:
            assign(self.model, f"{name}.weight", self.table(f"{name}.weight"))
        reader = self.head(torch.arange(vocabulary))
        if reader.bias is not None:
            assign(self.model, f"{head}.bias", reader.bias)
        if self.layout.tied:
            self._tie()
        else:
            assign(self.model, f"{head}.weight", reader.weight)
        renumber(self.model, self.layout, self.slots)
        return self.model

    @torch.no_grad()
    def outline(self) -> PreTrainedModel:
        """Have the shapes of tables and head in the model, whose stages have theirs, and not what they hold."""
        for name in [*(f"{e}.weight" for e in self.architecture.embed), *self._head_names()]:
            there = self.model.get_parameter(name)
            shape = self._changed(name, there.double()).shape
            assign(self.model, name, torch.empty(shape, device="meta"))
        if self.layout.tied:
            self._tie()
        renumber(self.model, self.layout, self.slots)
        return self.model

    def _head_names(self) -> list[str]:
        names = [f"{self.architecture.head}.{leaf}" for leaf in ("weight", "bias")]
        return [n for n in names if n in self.layout.axes]

    def _tie(self) -> None:
        module = self.model.get_submodule(self.architecture.head)
        assert isinstance(module, nn.Linear)
        module.weight = self.model.get_parameter(self.parts.table)
        module.in_features = module.weight.shape[1]

    def whole(self, dtype: torch.dtype) -> PreTrainedModel:
        """A model of its own with all weights, of the dense model."""
        other = Working(
            self.source,
            fold=self.folds,
            tie=self.tie,
            split=self.layout.select(["edge"]),
            device=self.device,
        )
        for edge in other.layout.edges:
            other.model.set_submodule(edge.stage, other.stage(edge, dtype))
        return other.settle().to(dtype=dtype)  # type: ignore[call-arg]

    def _changed(self, name: str, W: Tensor) -> Tensor:
        for i, axis in enumerate(self.layout.axes[name]):
            for part, change in [] if axis is None else along(axis, self.changes):
                W = contract(W, i, part, change)
        return W

    def _final(self) -> nn.Module:
        """The final norm, and where a tied head is kept behind a folded one, the matrix between them."""
        found = self.parts.part(self.architecture.final_norm)
        if not isinstance(found, Norm | nn.Sequential):
            found = self.architecture.norm_of(found)
        if not self.folds:
            return found
        assert isinstance(found, Norm)
        self.closing: Norm = own_copy(
            found
        )  # as it comes: rows of the head take it up when they are read
        if self.parts.tied and self.tie == "keep":
            mix = nn.Linear(found.d, found.d, bias=False, device="meta")
            mix.weight = nn.Parameter(torch.eye(found.d, dtype=torch.float64, device=self.device))
            fold_norm(found, [mix])
            return nn.Sequential(found, mix)
        fold_norm(found, [])
        found.centred = found.centred and not self.centres
        return found
