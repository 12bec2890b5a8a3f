"""Labels: a model's layout, read off its modules; that of a config, without a weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..core.group import Group
from ..core.kind import Kind, space_name
from ..core.space import Space
from . import modules
from .architecture import Architecture
from .axes import Axis, Edge, Role
from .families import architecture
from .layout import Layout
from .vocabulary import Head


def label(model: PreTrainedModel) -> Layout:
    """The layout of a restructured model (also one already rotated, sliced, or on the meta device)."""
    arch = architecture(model.config)
    blocks = model.get_submodule(arch.blocks)
    assert isinstance(blocks, nn.ModuleList)
    spaces: dict[str, Space] = {}
    axes: dict[str, tuple[Axis | None, ...]] = {}
    edges: list[Edge] = []
    ranks: dict[str, int] = {}
    branches: dict[str, str] = {}
    windows: dict[str, int | None] = {}
    rotary = _rotary(model, arch)
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}  # each tied tensor once

    def put(weight: str, *where: Axis | None) -> None:
        """Label a linear layer's weight (out, in) and bias (out), where it has them; its factors, where it is
        split; and a table's rows, of which the last ones may be two factors."""
        if isinstance(pair := model.get_submodule(weight), modules.Factored):
            part = weight.removeprefix(f"{path}.").partition(".")[2]
            even = 1 / (1 / pair.in_features + 1 / pair.out_features)
            name = inside(
                Kind.EDGE, pair.second.in_features, Group.INVERTIBLE, even=even, part=part
            )
            put(f"{weight}.first", Axis(name, Role.WRITE), where[1])
            put(f"{weight}.second", where[0], Axis(name, Role.READ))
            return
        parts = {"weight": where, "bias": where[:1]}
        parts |= {"common": where, "rare": (None, None), "basis": (None, *where[1:])}
        axes.update({n: a for leaf, a in parts.items() if (n := f"{weight}.{leaf}") in shapes})

    final = model.get_submodule(arch.final_norm)
    norm = final[0] if isinstance(final, nn.Sequential) else final
    assert isinstance(norm, modules.Norm)
    folded = norm.gain is None and norm.bias is None and not norm.centred

    turns = Group.SIGNED_PERMUTATION if arch.post_normed else Group.ORTHOGONAL

    def inside(kind: Kind, dim: int, group: Group, copies: int = 1, **more: Any) -> str:
        """A space inside stage s of block i, and its name."""
        name = space_name(kind, i, part=more.get("part"))
        spaces[name] = Space(name, kind, dim, group, copies, block=i, stage=s, **more)
        return name

    def stream(block: int, number: int, width: int) -> None:
        point = space_name(Kind.RESIDUAL, block, number)
        group = turns if folded else Group.IDENTITY
        spaces[point] = Space(point, Kind.RESIDUAL, width, group, block=block, stage=number)

    points = [(i, s) for i, b in enumerate(blocks) for s in range(len(b.stages))]  # type: ignore[arg-type]
    head = model.get_submodule(arch.head)
    assert isinstance(head, nn.Linear | Head)
    end: int = final[1].in_features if isinstance(final, nn.Sequential) else head.in_features  # type: ignore
    width = _stream_widths(
        [model.get_submodule(f"{arch.blocks}.{i}.stages.{s}") for i, s in points], end
    )
    for n, (i, s) in enumerate(points):
        path, point = f"{arch.blocks}.{i}.stages.{s}", space_name(Kind.RESIDUAL, i, s)
        block, number = points[n + 1] if n + 1 < len(points) else (len(blocks), 0)
        after = space_name(Kind.RESIDUAL, block, number)
        stage = model.get_submodule(path)
        assert isinstance(stage, modules.Stage)
        edges.append(Edge(path, point, after, i, s, block != i, stage.post is not None))
        read, write = Axis(point, Role.READ), Axis(after, Role.WRITE)
        for name in ("norm.gain", "norm.bias"):
            if f"{path}.{name}" in shapes:
                axes[f"{path}.{name}"] = (None,)
        if stage.post is not None:
            axes[f"{path}.post.gain"] = (Axis(after, Role.GATE),)
        if f"{path}.shortcut" in shapes:
            axes[f"{path}.shortcut"] = (read, None if stage.low_rank else write)
            if stage.low_rank:
                ranks[after] = shapes[f"{path}.shortcut"][1]
        stream(i, s, width[n])
        if (a := stage.attention) is not None:
            qk, vo = a.k.out_features // a.kv_heads, a.v.out_features // a.kv_heads
            normed = a.q_norm is not None
            group = Group.IDENTITY if normed else Group.ROTARY if rotary else Group.INVERTIBLE
            turned = rotary if a.pairs is None else 2 * a.pairs.shape[1]
            qk_space = inside(Kind.QK, qk, group, a.kv_heads, rotary=turned, normed=normed)
            vo_space = inside(Kind.VO, vo, Group.INVERTIBLE, a.kv_heads)
            grain = a.heads // a.kv_heads * vo
            name = inside(Kind.HEADS, a.kv_heads, Group.PERMUTATION, grain=grain)
            branches[f"{path}.attention"] = name
            windows[name] = a.sliding_window
            made, mixed = Axis(name, Role.WRITE), Axis(name, Role.READ)
            put(f"{path}.attention.q", Axis(qk_space, Role.READ, a.heads, made), read)
            put(f"{path}.attention.k", Axis(qk_space, Role.WRITE, a.kv_heads, made), read)
            for part in ("q_norm", "k_norm") if normed else ():
                axes[f"{path}.attention.{part}.gain"] = (Axis(qk_space, Role.GATE),)
            put(f"{path}.attention.v", Axis(vo_space, Role.WRITE, a.kv_heads, made), read)
            put(f"{path}.attention.out", write, Axis(vo_space, Role.READ, a.heads, mixed))
        if (m := stage.mlp) is not None:
            channels = branches[f"{path}.mlp"] = inside(Kind.MLP, m.up.out_features, _mlp_group(m))
            if m.gate is not None:
                put(f"{path}.mlp.gate", Axis(channels, Role.GATE), read)
            put(f"{path}.mlp.up", Axis(channels, Role.WRITE), read)
            put(f"{path}.mlp.down", write, Axis(channels, Role.READ))
    first, last = edges[0].source, edges[-1].target
    stream(len(blocks), 0, end)
    for embedding in arch.embed:
        put(embedding, None, Axis(first, Role.WRITE))
    tied = not shapes.keys() & {f"{arch.head}.{leaf}" for leaf in ("weight", "common")}
    behind = isinstance(
        final, nn.Sequential
    )  # a tied head behind a k×k matrix: the table's own basis is x.0.0's
    if isinstance(final, nn.Sequential):
        put(f"{arch.final_norm}.1", Axis(first, Role.READ), Axis(last, Role.READ))
    else:
        for name in ("gain", "bias"):
            if f"{arch.final_norm}.{name}" in shapes:
                axes[f"{arch.final_norm}.{name}"] = (None,)
    put(arch.head, None, None if behind else Axis(last, Role.READ))
    missing = shapes.keys() - axes.keys()
    assert not missing, f"weights without a label: {sorted(missing)}"
    return Layout(
        architecture=arch,
        spaces=spaces,
        axes=axes,
        shapes=shapes,
        edges=tuple(edges),
        branches=branches,
        windows=windows,
        shortcuts=frozenset(e.stage for e in edges if f"{e.stage}.shortcut" in shapes),
        ranks=ranks,
        tied=tied,
        centred=norm.centred,
        folded=folded,
    )


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
