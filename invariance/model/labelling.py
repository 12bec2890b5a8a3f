"""Labels: the layout of a rewritten model, read off its modules by its architecture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..core.group import Group
from ..core.kind import Kind, space_name
from ..core.space import Space
from . import modules
from .architecture import Architecture
from .axes import Axis, Edge, Role
from .layout import Layout
from .vocabulary import Head


def labelled(model: PreTrainedModel, arch: Architecture) -> Layout:
    """The layout of a restructured model (also one already rotated, sliced, or on the meta device)."""
    final = model.get_submodule(arch.final_norm)
    norm = final[0] if isinstance(final, nn.Sequential) else final
    assert isinstance(norm, modules.Norm)
    folded = norm.gain is None and norm.bias is None and not norm.centred
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}  # each tied tensor once
    draft, edges = _Draft(model, arch, shapes, folded), _edges(model, arch)
    stages = [draft.stage(edge) for edge in edges]
    end = _end_width(model, arch)
    for edge, stage, width in zip(edges, stages, _stream_widths(stages, end), strict=True):
        draft.add_point(edge.block, edge.number, width)
        draft.add_stage(edge, stage)
    draft.add_point(edges[-1].block + 1, 0, end)
    draft.add_ends(edges[0].source, edges[-1].target)
    missing = shapes.keys() - draft.axes.keys()
    assert not missing, f"weights without a label: {sorted(missing)}"
    return Layout(
        architecture=arch,
        spaces=draft.spaces,
        axes=draft.axes,
        shapes=shapes,
        edges=tuple(edges),
        branches=draft.branches,
        windows=draft.windows,
        shortcuts=frozenset(e.stage for e in edges if f"{e.stage}.shortcut" in shapes),
        ranks=draft.ranks,
        tied=not shapes.keys() & {f"{arch.head}.{leaf}" for leaf in ("weight", "common")},
        centred=norm.centred,
        folded=folded,
    )


@dataclass(frozen=True)
class _Draft:
    """What a layout says of the weights so far: each ``add`` labels one more part of the model."""

    model: PreTrainedModel
    arch: Architecture
    shapes: dict[str, tuple[int, ...]]
    folded: bool
    spaces: dict[str, Space] = field(default_factory=dict)
    axes: dict[str, tuple[Axis | None, ...]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    windows: dict[str, int | None] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)

    def stage(self, edge: Edge) -> modules.Stage:
        found = self.model.get_submodule(edge.stage)
        assert isinstance(found, modules.Stage)
        return found

    def add_point(self, block: int, number: int, width: int) -> None:
        """A point of the stream, which turns freely once norms are folded, as far as norms behind branches let it."""
        point = space_name(Kind.RESIDUAL, block, number)
        turns = Group.SIGNED_PERMUTATION if self.arch.post_normed else Group.ORTHOGONAL
        group = turns if self.folded else Group.IDENTITY
        self.spaces[point] = Space(point, Kind.RESIDUAL, width, group, block=block, stage=number)

    def add_stage(self, edge: Edge, stage: modules.Stage) -> None:
        """All that lies in one stage: its norms, its shortcut and its branches."""
        read, write = Axis(edge.source, Role.READ), Axis(edge.target, Role.WRITE)
        self._add_unchanged(f"{edge.stage}.norm.gain", f"{edge.stage}.norm.bias")
        if stage.post is not None:
            self.axes[f"{edge.stage}.post.gain"] = (Axis(edge.target, Role.GATE),)
        if (shortcut := f"{edge.stage}.shortcut") in self.shapes:
            self.axes[shortcut] = (read, None if stage.low_rank else write)
            if stage.low_rank:
                self.ranks[edge.target] = self.shapes[shortcut][1]
        if stage.attention is not None:
            self._add_attention(edge, stage.attention, read, write)
        if stage.mlp is not None:
            self._add_mlp(edge, stage.mlp, read, write)

    def _add_attention(self, edge: Edge, a: modules.Attention, read: Axis, write: Axis) -> None:
        """Its spaces are query/key dims and value dims, per KV head, and the KV groups, whose directions are the heads."""
        path = f"{edge.stage}.attention"
        qk, vo = a.k.out_features // a.kv_heads, a.v.out_features // a.kv_heads
        normed, rotary = a.q_norm is not None, _rotary(self.model, self.arch)
        group = Group.IDENTITY if normed else Group.ROTARY if rotary else Group.INVERTIBLE
        turned = rotary if a.pairs is None else 2 * a.pairs.shape[1]
        qk_space = self._inside(edge, Kind.QK, qk, group, a.kv_heads, rotary=turned, normed=normed)
        vo_space = self._inside(edge, Kind.VO, vo, Group.INVERTIBLE, a.kv_heads)
        grain = a.heads // a.kv_heads * vo
        groups = self._inside(edge, Kind.HEADS, a.kv_heads, Group.PERMUTATION, grain=grain)
        self.branches[path], self.windows[groups] = groups, a.sliding_window
        made, mixed = Axis(groups, Role.WRITE), Axis(groups, Role.READ)
        self._add_linear(edge, f"{path}.q", Axis(qk_space, Role.READ, a.heads, made), read)
        self._add_linear(edge, f"{path}.k", Axis(qk_space, Role.WRITE, a.kv_heads, made), read)
        for part in ("q_norm", "k_norm") if normed else ():
            self.axes[f"{path}.{part}.gain"] = (Axis(qk_space, Role.GATE),)
        self._add_linear(edge, f"{path}.v", Axis(vo_space, Role.WRITE, a.kv_heads, made), read)
        self._add_linear(edge, f"{path}.out", write, Axis(vo_space, Role.READ, a.heads, mixed))

    def _add_mlp(self, edge: Edge, m: modules.Mlp, read: Axis, write: Axis) -> None:
        path = f"{edge.stage}.mlp"
        channels = self._inside(edge, Kind.MLP, m.up.out_features, _mlp_group(m))
        self.branches[path] = channels
        if m.gate is not None:
            self._add_linear(edge, f"{path}.gate", Axis(channels, Role.GATE), read)
        self._add_linear(edge, f"{path}.up", Axis(channels, Role.WRITE), read)
        self._add_linear(edge, f"{path}.down", write, Axis(channels, Role.READ))

    def add_ends(self, first: str, last: str) -> None:
        """The tables, the final norm and the head, between the first and the last point of the stream."""
        for embedding in self.arch.embed:
            self._add_plain(embedding, None, Axis(first, Role.WRITE))
        if isinstance(self.model.get_submodule(self.arch.final_norm), nn.Sequential):
            # A tied head behind a k×k matrix reads the table's own basis, that of the first point.
            self._add_plain(
                f"{self.arch.final_norm}.1", Axis(first, Role.READ), Axis(last, Role.READ)
            )
            self._add_plain(self.arch.head, None, None)
        else:
            self._add_unchanged(f"{self.arch.final_norm}.gain", f"{self.arch.final_norm}.bias")
            self._add_plain(self.arch.head, None, Axis(last, Role.READ))

    def _inside(
        self, edge: Edge, kind: Kind, dim: int, group: Group, copies: int = 1, **more: Any
    ) -> str:
        """A space inside a stage, and its name."""
        name = space_name(kind, edge.block, part=more.get("part"))
        self.spaces[name] = Space(
            name, kind, dim, group, copies, block=edge.block, stage=edge.number, **more
        )
        return name

    def _add_linear(self, edge: Edge, path: str, *where: Axis | None) -> None:
        """A linear layer of a stage; of one that is split, both factors and the space between them."""
        pair = self.model.get_submodule(path)
        if not isinstance(pair, modules.Factored):
            self._add_plain(path, *where)
            return
        part = path.removeprefix(f"{edge.stage}.").partition(".")[2]
        even = 1 / (1 / pair.in_features + 1 / pair.out_features)
        dim = pair.second.in_features
        name = self._inside(edge, Kind.EDGE, dim, Group.INVERTIBLE, even=even, part=part)
        self._add_plain(f"{path}.first", Axis(name, Role.WRITE), where[1])
        self._add_plain(f"{path}.second", where[0], Axis(name, Role.READ))

    def _add_plain(self, path: str, *where: Axis | None) -> None:
        """A linear layer's weight (out, in) and bias (out), where it has them; of a table the rows, where the last ones
        are two factors."""
        parts = {"weight": where, "bias": where[:1]}
        parts |= {"common": where, "rare": (None, None), "basis": (None, *where[1:])}
        for leaf, labels in parts.items():
            if (name := f"{path}.{leaf}") in self.shapes:
                self.axes[name] = labels

    def _add_unchanged(self, *names: str) -> None:
        """Vectors that no change of basis changes, where they are there: gains and biases of norms that are not folded."""
        self.axes.update({name: (None,) for name in names if name in self.shapes})


def _edges(model: PreTrainedModel, arch: Architecture) -> list[Edge]:
    """The stages in the order that a token passes them, each with the points of the stream at its ends."""
    blocks = model.get_submodule(arch.blocks)
    assert isinstance(blocks, nn.ModuleList)
    found = []
    for i, block in enumerate(blocks):
        assert isinstance(block, modules.Block)
        for s, stage in enumerate(block.stages):
            leaves = s + 1 == len(block.stages)
            found.append(
                Edge(
                    stage=f"{arch.blocks}.{i}.stages.{s}",
                    source=space_name(Kind.RESIDUAL, i, s),
                    target=space_name(Kind.RESIDUAL, *((i + 1, 0) if leaves else (i, s + 1))),
                    block=i,
                    number=s,
                    leaves=leaves,
                    post=stage.post is not None,
                )
            )
    return found


def _end_width(model: PreTrainedModel, arch: Architecture) -> int:
    """The stream's width behind the last stage."""
    final, head = model.get_submodule(arch.final_norm), model.get_submodule(arch.head)
    reader = final[1] if isinstance(final, nn.Sequential) else head
    assert isinstance(reader, nn.Linear | Head)
    return reader.in_features


def _rotary(model: PreTrainedModel, arch: Architecture) -> int:
    """How many dims of a head rotary positions turn; alike in layers of all types, which may turn by other angles."""
    if arch.rotary is None:
        return 0
    buffers = model.get_submodule(arch.rotary).named_buffers()
    return next(
        2 * frequencies.numel() for name, frequencies in buffers if name.endswith("inv_freq")
    )


def _stream_widths(stages: Sequence[nn.Module], end: int) -> list[int]:
    """The stream's width before each stage, behind all of which it is ``end``; a stage may have no branch left."""
    widths: list[int] = []
    for stage in reversed(stages):
        assert isinstance(stage, modules.Stage)
        if stage.attention is not None:
            end = stage.attention.q.in_features
        elif stage.mlp is not None:
            end = stage.mlp.up.in_features
        elif stage.shortcut is not None:
            end = stage.shortcut.shape[0]
        widths.append(end)
    return widths[::-1]


def _mlp_group(mlp: modules.Mlp) -> Group:
    if mlp.gate is not None:
        return Group.MONOMIAL
    return Group.POSITIVE_MONOMIAL if isinstance(mlp.act, nn.ReLU) else Group.PERMUTATION
