"""A cut model on its way to a sink: stage by stage, under the names of its checkpoint, rounded once."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from ..calibrate.batch import Batch
from ..calibrate.enter import enter
from ..core.errors import InvarianceError
from ..io.checkpoint import described
from ..io.clients import add_older_keys
from ..io.export import Renaming, longrope, stock_config
from ..io.sink import Sink
from ..io.skeleton import skeleton
from ..model.axes import Edge
from ..model.families import architecture
from ..model.reparametrize import attention_of
from ..model.source import placed
from ..model.streamed import chunks, ending, looked_up, own_copy, skeleton_in
from ..model.verify import tolerance
from ..model.working import Working
from .demand import Widths
from .plan import Plan

ENDS = "ends"  # the step in which all is written that is no stage


class Writer:
    """Gives a sink what a stock checkpoint holds where there can be one, else a custom one.

    The parts of a stock model are also run as the family's own code runs them, on a few tokens in float64, beside the
    canonical ones: it raises InvarianceError where they compute anything else.
    """

    def __init__(self, sink: Sink, plan: Plan, dtype: torch.dtype) -> None:
        self.sink, self.plan, self.dtype = sink, plan, dtype
        self.why: str | None = None  # there is no stock one
        self.config: PretrainedConfig | None = None
        self.parameters = self.shortcuts = (
            0  # how many numbers were written, and of them in shortcuts
        )
        self.check: _Check | None = None

    def begin(self, parts: Working, widths: Widths) -> None:
        self.widths = widths
        self.why = self.plan.why_not_stock(widths)
        self.renaming = None if self.why else Renaming.of(self.plan.layout, widths)

    def stage(self, parts: Working, edge: Edge) -> None:
        stage = parts.hold(edge)
        if self.renaming is None:
            found = {f"{edge.stage}.{n}": t for n, t in stage.state_dict().items()}
        else:
            found = self.renaming.tensors(stage, edge.stage)
            self.check = self.check or _Check(self.plan, self.widths, self.renaming, parts)
            self.check.stage(parts, edge, found)
        self._write(found, edge.stage)
        self._done(edge.stage)

    def end(self, parts: Working) -> None:
        arch = parts.architecture
        if self.check is not None:
            self.check.end(parts)
        for name in arch.embed:
            table = f"{name}.weight"
            self._write({table: self._table(parts, table)})
        final = parts.model.get_submodule(arch.final_norm)
        outline = parts.outline()
        if self.renaming is None:
            self._write({f"{arch.final_norm}.{n}": t for n, t in final.state_dict().items()})
            recipe = self.plan.recipe
            layout, dense = self.plan.layout, self.plan.config
            self.config = described(outline, layout, dense, recipe.tie)
        else:
            self._write(self.renaming.tensors(final, arch.final_norm))
            assert self.check is not None
            self.config = self.check.config
            if self.config is not None:
                add_older_keys(self.config)
        for leaf, found in self._head(parts).items():
            self._write({f"{arch.head}.{leaf}": found})
        self._done(ENDS)

    def _table(self, parts: Working, name: str) -> Tensor:
        """A table that writes the stream, rounded some rows at a time."""
        rows, width = parts.parts.model.get_parameter(name).shape
        scale = 1.0
        if self.renaming is not None and name == parts.parts.table:
            scale = self.renaming.table
        made = _Rows(rows)
        for part in chunks(rows, width * torch.float64.itemsize):
            found = parts.table(name, torch.arange(part.start, part.stop))
            made.put(part, self._cast(found if scale == 1.0 else found * scale))
        return made.found

    def _head(self, parts: Working) -> dict[str, Tensor]:
        """The head's own tensors, rounded some rows at a time; a tied one has no weight of its own."""
        rows, width = parts.parts.model.get_parameter(parts.parts.table).shape
        made = dict[str, _Rows]()
        for part in chunks(rows, width * torch.float64.itemsize):
            reader = parts.head(torch.arange(part.start, part.stop))
            found = {"weight": None if parts.layout.tied else reader.weight, "bias": reader.bias}
            for leaf, some in found.items():
                if some is not None:
                    made.setdefault(leaf, _Rows(rows)).put(part, self._cast(some))
        return {leaf: each.found for leaf, each in made.items()}

    def _cast(self, value: Tensor) -> Tensor:
        return value.detach().to("cpu", self.dtype if value.is_floating_point() else value.dtype)

    def _write(self, tensors: Mapping[str, Tensor], step: str = ENDS) -> None:
        """What a run that was killed has written of the same work stands: it is computed again, to the same bits."""
        floats = [t for t in tensors.values() if t.is_floating_point()]
        self.parameters += sum(t.numel() for t in floats)
        met = [t for n, t in tensors.items() if n.endswith(".shortcut")]
        self.shortcuts += sum(t.numel() for t in met)
        if tensors and step not in self.sink.finished:
            self.sink.write({name: self._cast(t).contiguous() for name, t in tensors.items()})

    def _done(self, step: str) -> None:
        if step not in self.sink.finished:
            self.sink.done(step)


class _Rows:
    """A tensor that is filled some rows at a time, so that it is in memory once."""

    found: Tensor

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def put(self, where: slice, some: Tensor) -> None:
        if where.start == 0:
            self.found = some.new_empty(self.rows, *some.shape[1:])
        self.found[where] = some


class _Check:
    """The stock model's own code beside the canonical stages, in float64 and on a few tokens."""

    def __init__(self, plan: Plan, widths: Widths, renaming: Renaming, parts: Working) -> None:
        self.plan, self.widths, self.renaming = plan, widths, renaming
        vocabulary = plan.config.get_text_config().vocab_size
        self.ids = torch.arange(32).remainder(vocabulary)[None]
        self.tokens = [(self.ids, torch.ones_like(self.ids, dtype=torch.bool))]
        self.ours = enter(parts, self.tokens, torch.float64)[0]
        self.theirs: Batch | None = None
        self.held: dict[str, Tensor] = {}  # of the block that passes
        self.passed = 0

    def stage(self, parts: Working, edge: Edge, found: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            self.ours.x = self.ours.through(parts.hold(edge), edge)
        self.held |= found
        if edge.leaves and self.held:
            self._block(parts, edge.block)

    @torch.no_grad()
    def _block(self, parts: Working, block: int) -> None:
        if self.theirs is None:
            self.config = self._config(parts, block)
            self.model = skeleton_in(torch.float64, skeleton(self.config), parts.device)
            self.arch = architecture(self.model.config)
            self.theirs = enter(_Embedding(self, parts), self.tokens, torch.float64)[0]
        path = f"{self.arch.blocks}.{self.passed}"
        layer = own_copy(self.model.get_submodule(path))
        placed(layer, {n.removeprefix(f"{path}."): t for n, t in self.held.items()})
        out = layer(self.theirs.x, **self.theirs.contexts[self.passed])
        self.theirs.x = out[0] if isinstance(out, tuple) else out
        self.held, self.passed = {}, self.passed + 1

    def _config(self, parts: Working, block: int) -> PretrainedConfig:
        layout, rope = self.plan.layout, dict[str, Any]()
        space = next((n for n in layout.select(["qk"]) if n.split(".")[1] == str(block)), None)
        chosen = None if space is None else attention_of(parts.model, layout, space).pairs
        if chosen is not None:
            rope, why = longrope(parts.model, layout, self.plan.config, chosen[0])
            if why:
                raise InvarianceError(f"the plan had a stock checkpoint, and there is none: {why}")
        config, why = stock_config(layout, self.widths, self.plan.config, rope)
        if config is None:
            raise InvarianceError(f"the plan had a stock checkpoint, and there is none: {why}")
        return config

    def looked_up(self, parts: Working, name: str, index: Tensor | None) -> Tensor:
        found = parts.table(name, index)
        return found * self.renaming.table if name == parts.parts.table else found

    @torch.no_grad()
    def end(self, parts: Working) -> None:
        assert self.theirs is not None
        arch, off, total = parts.architecture, 0.0, 0.0
        norm = own_copy(self.model.get_submodule(self.arch.final_norm))
        exported = self.renaming.tensors(
            parts.model.get_submodule(arch.final_norm), arch.final_norm
        )
        placed(norm, {n.removeprefix(f"{arch.final_norm}."): t for n, t in exported.items()})
        for rows, logits in parts.heads(torch.float64):
            expected = logits(self.ours.x)
            reader = parts.head(torch.arange(rows.start, rows.stop))
            weight = reader.weight.detach()
            if parts.layout.tied:
                weight = weight * self.renaming.table
            bias = None if reader.bias is None else reader.bias.detach()
            with ending(self.arch, self.model, norm, weight, bias) as made:
                off += (made(self.theirs.x) - expected).square().sum().item()
            total += expected.square().sum().item()
        error = (off / total) ** 0.5
        if not error <= tolerance(torch.float32, self.plan.layout.depth):  # families' norms
            raise InvarianceError(
                f"the stock checkpoint's logits differ from the sliced model's by {error:.1e}"
            )


class _Embedding:
    """The stock model's embedding, to enter it by."""

    def __init__(self, check: _Check, parts: Working) -> None:
        self.model, self.device = check.model, parts.device
        self.check, self.parts = check, parts

    def embedding(self, ids: Tensor) -> AbstractContextManager[Tensor]:
        tables = self.check.arch.embed

        def rows(name: str, index: Tensor | None) -> Tensor:
            return self.check.looked_up(self.parts, name, index)

        return looked_up(self.model, tables, rows, ids)
