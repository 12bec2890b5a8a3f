"""Apply changes to a model's weights: the one operator behind rotation, slicing, and pruning of heads and channels."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import replace

import torch
from einops import repeat
from jaxtyping import Float64, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..core.change import Change
from ..core.dense import pairs_kept
from ..core.errors import InvarianceError
from ..core.space import Space
from .axes import Axis, Edge, Role
from .folding import assign
from .layout import Layout
from .modules import Attention, Stage
from .vocabulary import tie

_NO_OFFSET = {
    "residual": "a norm stands between the stream and its readers",
    "qk": "queries multiply keys, so nothing adds an offset up",
}


def reparametrize(
    model: PreTrainedModel,
    layout: Layout,
    changes: Mapping[str, Change],
    within: tuple[str, ...] = ("",),
) -> None:
    """Change the basis of the named spaces, in place, in float64 with one cast back.

    Each labelled axis is contracted with the change of its space: writers with ``encode``, readers with ``decode``;
    readers' biases take up W·``offset``. A residual edge whose ends change differently carries D_sᵀ E_t, or what
    ``entry`` of the target puts in its place. Applying one change after another is applying their product, so spaces can
    be changed one at a time. Changes speak of the copies that the layout has: where KV groups move or go in the same
    call, the changes of their copies move and go with them.
    ``within`` says how the names begin of what is changed now, stages at least: the rest of the model is changed by other
    calls, and ``renumber`` then tells attentions which slot of a cache is theirs.
    Where rotary positions turn pairs of dims, the frequencies go with the pairs that ``encode`` keeps. A branch that is
    cut to width 0 goes with all its weights, and with a stage's last branch its norm; the residual edge stays.

    Raises InvarianceError, with nothing changed, for a space that the layout has not, a change of another shape, a cut
    under a norm, an offset whose readers do not add it up, KV groups that are mixed, or a change that does more to the
    pairs that carry rotary positions than to choose among them, one complex scale each.
    """
    chosen = _check(layout, changes)
    if within == ("",):
        _check_cache(model, layout, changes)
    gone = layout.gone({name: change.width for name, change in changes.items()})
    with torch.no_grad():
        for name, change in changes.items():
            if change.offset is not None:
                _shift_readers(model, layout, layout.spaces[name], changes, within)
        _contract_weights(model, layout, changes, within, gone)
        for name, pairs in chosen.items():
            if layout.attention(name).startswith(within):
                attention_of(model, layout, name).choose(pairs)
        before = slots(model, layout)
        _resize(model, layout, changes, within)
        if within == ("",):
            renumber(model, layout, before)
            if layout.tied:
                tie(model, layout.architecture)
        for edge in layout.edges:
            if f"{edge.stage}.".startswith(within):
                _change_edge(model, layout, edge, changes)


def _contract_weights(
    model: PreTrainedModel,
    layout: Layout,
    changes: Mapping[str, Change],
    within: tuple[str, ...],
    gone: tuple[str, ...],
) -> None:
    """Contract every labelled axis with the change of its space; what goes, and shortcuts, are left to others."""
    # An earlier call may have let branches go.
    present = {name for name, _ in model.named_parameters()}
    for name, axes in {**layout.axes, **_new_biases(present, layout)}.items():
        labelled = [axis for axis in axes if axis is not None]
        changed = any(part.space in changes for axis in labelled for part in axis.spaces)
        here = name in present and name.startswith(within)
        if not changed or not here or name.endswith(".shortcut") or name.startswith(gone):
            continue
        W = model.get_parameter(name).double()
        for i, axis in enumerate(axes):
            for part, change in [] if axis is None else along(axis, changes):
                W = contract(W, i, part, change)
        assign(model, name, W)


def attention_of(model: PreTrainedModel, layout: Layout, space: str) -> Attention:
    """The attention whose queries and keys a space holds."""
    found = model.get_submodule(layout.attention(space))
    assert isinstance(found, Attention)
    return found


def _check(layout: Layout, changes: Mapping[str, Change]) -> dict[str, Int[Tensor, "c n"]]:
    """The pairs kept by name, of those spaces whose frequencies do not stay as they are."""
    chosen = {}
    for name, change in changes.items():
        space = layout.spaces.get(name)
        if space is None:
            raise InvarianceError(
                f"the layout has no space '{name}'. `invariance inspect` lists a model's spaces."
            )
        shape, g = (space.copies, space.dim, change.width), space.grain
        seen = (space.copies, g * space.dim, g * change.width)
        if change.encode.shape != shape or change.decode.shape not in (shape, seen):
            raise InvarianceError(
                f"a change of space '{name}' has the shapes {tuple(change.encode.shape)} and "
                f"{tuple(change.decode.shape)}, where {shape} would fit: (copies, dim, width)."
            )
        if change.offset is not None and (
            space.kind in _NO_OFFSET or change.offset.shape != (space.copies, space.seen)
        ):
            raise InvarianceError(
                f"a change of space '{name}' has an offset of shape {tuple(change.offset.shape)}, which cannot be: "
                f"{_NO_OFFSET.get(space.kind, f'{shape[:2]} would fit')}. Leave it out, or choose another space."
            )
        if not change.width and name not in layout.branches.values():
            raise InvarianceError(
                f"a change cuts space '{name}' to width 0, and no branch vanishes with it. Keep one direction at least."
            )
        if space.normed and not space.fits(change.width):
            raise InvarianceError(
                f"a change cuts space '{name}' to width {change.width}, and {space.why}. Leave it whole."
            )
        if space.kind == "heads" and change.encode.picks is None:
            raise InvarianceError(
                f"a change of space '{name}' mixes KV groups, because {space.why}. Choose among them."
            )
        if not space.rotary or space.normed:
            continue
        kept, read = (pairs_kept(X, space.rotary) for X in (change.encode, change.decode))
        if kept is None or read is None or kept.shape != read.shape:
            raise InvarianceError(
                f"a change of space '{name}', to {change.width} dims, does more than choose among the "
                f"{space.rotary // 2} pairs (j, j + {space.rotary // 2}) of the {space.rotary} dims that carry rotary "
                "positions, with one complex scale each: every pair is turned by an angle of its own, so a mix of them, "
                "or half of one, commutes with none. Keep whole pairs, as (i, i + half), and other dims behind them."
            )
        same = torch.arange(space.rotary // 2, device=kept.device).repeat(space.copies, 1)
        if not torch.equal(kept, same):
            chosen[name] = kept
    return chosen


def _check_cache(model: PreTrainedModel, layout: Layout, changes: Mapping[str, Change]) -> None:
    """A cache counts the tokens that it holds in its first slot, which a window may make another kind than the rest."""
    found = [
        (a.layer_idx, a.sliding_window, changes.get(layout.branches[b]))
        for b, a in _attentions(model, layout)
    ]
    if found and not any(
        w == min(found)[1] for _, w, change in found if change is None or change.width
    ):
        raise InvarianceError(
            "changes take every attention that fills the first slot of a cache (of its window, where windows differ), "
            "and the model could not count its tokens. Keep one of them."
        )


def along(axis: Axis, changes: Mapping[str, Change]) -> list[tuple[Axis, Change]]:
    """What an axis is contracted with, in turn: first the runs of it move or go, then what is in each changes."""
    found = []
    inner = changes.get(axis.space)
    if axis.outer is not None and (groups := changes.get(axis.outer.space)) is not None:
        found.append((axis.outer, groups))
        axis = replace(axis, heads=axis.heads // groups.encode.dim * groups.width)
        kept = groups_kept(groups)
        inner = inner.take(kept) if inner is not None and len(kept) else None
    return found if inner is None else [*found, (axis, inner)]


def _shift_readers(
    model: PreTrainedModel,
    layout: Layout,
    space: Space,
    changes: Mapping[str, Change],
    within: tuple[str, ...],
) -> None:
    """W(x + o) + b = Wx + (b + W·o): readers without a bias get one.

    What KV groups give that go in the same call is no longer there to be shifted: the groups' change made up for all of it.
    """
    for name, i in layout.readers(space.name):
        offset = changes[space.name].offset
        if offset is None or not name.startswith(within):
            continue
        axis = layout.axes[name][i]
        reader = model.get_submodule(name.removesuffix(".weight"))
        assert isinstance(reader, nn.Linear) and axis is not None and i == 1
        W = reader.weight.double()
        if (
            axis.outer is not None
            and axis.space == space.name
            and (groups := changes.get(axis.outer.space))
        ):
            W, offset = contract(W, i, axis.outer, groups), offset[groups_kept(groups)]
            if not offset.numel():
                return
        shift = W @ repeat(offset.to(W.device), "c d -> (c r d)", r=W.shape[1] // offset.numel())
        bias = shift if reader.bias is None else shift + reader.bias.double()
        reader.bias = nn.Parameter(
            bias.to(reader.weight.dtype), requires_grad=reader.weight.requires_grad
        )


def _new_biases(present: Container[str], layout: Layout) -> dict[str, tuple[Axis | None, ...]]:
    """The labels of biases that readers got by an offset after the layout was made."""
    could = {
        bias: axes
        for name, space in layout.spaces.items()
        if space.kind not in _NO_OFFSET
        for bias, axes in layout.missing_biases(name).items()
    }
    return {b: axes for b, axes in could.items() if b in present}


def contract(W: Tensor, dim: int, axis: Axis, change: Change) -> Float64[Tensor, ...]:
    """One axis of a weight, in ``heads`` runs of d, against the change's d × k of the copy that each head uses.

    A direction may stand for several numbers of the axis, neighbours all.
    """
    X = change.decode if axis.role is Role.READ else change.encode
    X = X.grained(W.shape[dim] // (axis.heads * X.dim))
    return (X.pattern() if axis.role is Role.GATE else X).contract(W, dim, axis.heads)


def groups_kept(groups: Change) -> Int[Tensor, " k"]:
    """Which KV groups a change of them keeps."""
    kept = groups.encode.picks
    assert kept is not None  # else the change was refused
    return kept[0]


def _resize(
    model: PreTrainedModel,
    layout: Layout,
    changes: Mapping[str, Change],
    within: tuple[str, ...],
) -> None:
    """Tell the branches how many KV groups they have, and let those of width 0 go."""
    for branch, space in layout.branches.items():
        if space not in changes or not f"{branch}.".startswith(within):
            continue
        path, _, name = branch.rpartition(".")
        resized = model.get_submodule(path)
        assert isinstance(resized, Stage)
        if not changes[space].width:
            resized.drop(name)
        elif layout.spaces[space].kind == "heads":
            assert resized.attention is not None
            resized.attention.keep_groups(groups_kept(changes[space]))


def slots(model: PreTrainedModel, layout: Layout) -> dict[int | None, list[int]]:
    """The slots of a cache that attentions fill, by how far back they see."""
    found: dict[int | None, list[int]] = {}
    for _, attention in _attentions(model, layout):
        found.setdefault(attention.sliding_window, []).append(attention.layer_idx)
    return found


def renumber(
    model: PreTrainedModel, layout: Layout, before: Mapping[int | None, list[int]]
) -> None:
    """Give the attentions that are left the first slots of their kind: a cache counts its tokens in the first one."""
    left = {window: iter(found) for window, found in before.items()}
    for _, attention in _attentions(model, layout):
        attention.layer_idx = next(left[attention.sliding_window])


def _attentions(model: PreTrainedModel, layout: Layout) -> list[tuple[str, Attention]]:
    """The attentions that a model still has, and their names, in order."""
    found = [(e.stage, model.get_submodule(e.stage)) for e in layout.edges]
    return [
        (f"{n}.attention", s.attention)
        for n, s in found
        if isinstance(s, Stage) and s.attention is not None
    ]


def _change_edge(
    model: PreTrainedModel, layout: Layout, edge: Edge, changes: Mapping[str, Change]
) -> None:
    source, target = changes.get(edge.source), changes.get(edge.target)
    stage = model.get_submodule(edge.stage)
    assert isinstance(stage, Stage)
    if source is target and (source is None or stage.shortcut is None):
        return  # neither side changes, or one basis is on both
    grad = next(model.parameters()).requires_grad  # it may be on meta, where the stage is not
    like = next(stage.parameters(), torch.empty(0, dtype=model.dtype, requires_grad=grad))
    entry = None if target is None else target.entry
    if entry is not None:
        M, gone = entry.to(like.device), not entry.shape[1]
    else:
        d = layout.spaces[edge.source].dim if stage.shortcut is None else stage.shortcut.shape[0]
        M = stage.carry(torch.eye(d, dtype=torch.float64, device=like.device))
        if source is not None:
            M = source.decode.contract(M, axis=0)
        if target is not None:
            M = target.encode.contract(M)
        gone = is_identity(M)
    stage.low_rank = entry is not None
    stage.shortcut = (
        None if gone else nn.Parameter(M.to(like.dtype), requires_grad=like.requires_grad)
    )


def is_identity(M: Float64[Tensor, "s t"]) -> bool:
    """Whether a shortcut would change nothing, to the rounding of a product of d terms in float64."""
    if M.shape[0] != M.shape[1] or M.is_meta:
        return False
    eye = torch.eye(M.shape[0], dtype=M.dtype, device=M.device)
    return bool((M - eye).abs().amax() <= 8 * M.shape[0] * torch.finfo(M.dtype).eps)
