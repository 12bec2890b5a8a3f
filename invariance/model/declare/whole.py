"""The architecture of a small model: the two ends of its stream, and its blocks, which must be alike."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from ...core.errors import InputError
from ..architecture import Architecture
from ..tiny import Tiny
from ..vocabulary import scale_of
from .blocks import Block
from .keys import Keys, check_counts
from .norms import is_norm, one_rms
from .signals import Call, Signals, same, signals, tensors

SCALE = 1e-6  # relative: a factor may be kept in float32


def architecture_of(made: Tiny) -> Architecture:
    """What is read of one forward pass of a small model. Raises InputError with what the grammar has no words for."""
    run = signals(made.model, made.tokens(2, 12))
    path, layers = _layers(run)
    first, last = layers[0].given, layers[-1].results[0]
    embed, scaled = _embedding(run, path, first)
    norm, head = _ending(run, path, last)
    heads = getattr(made.config, "num_attention_heads", None) or 1  # only tells what reasons say
    blocks = [Block(call.name, run, heads) for call in layers]
    stages = [b.stages(c.given, c.results[0]) for b, c in zip(blocks, layers, strict=True)]
    if len(set(stages)) > 1:
        raise InputError("its layers are not alike: each has other branches or norms")
    used = [c.module for b in blocks for c in b.norms] + [norm.module]
    known = {*embed, norm.name, head.name, *(name for b in blocks for name in b.placed)}
    _check_all_placed(made.model, known)
    arch = Architecture(
        embed=embed,
        blocks=path,
        final_norm=norm.name,
        stages=stages[0],
        head=head.name,
        rotary=_rotary(run, path, layers),
        rms=one_rms(used),
        scaled=scaled,
    )
    check_counts(made.config)
    return Keys(made.config, arch).told(norm.module)


def _layers(run: Signals) -> tuple[str, list[Call]]:
    """The list of blocks and their calls; each is given what the one before gave."""
    lists = [
        name
        for name, m in run.model.named_modules()
        if isinstance(m, nn.ModuleList) and next(m.parameters(), None) is not None
    ]
    outer = [n for n in lists if not any(n.startswith(f"{other}.") for other in lists)]
    if len(outer) != 1:
        raise InputError(f"its layers lie in {len(outer)} lists of modules, not in one")
    path = outer[0]
    blocks: nn.ModuleList = run.model.get_submodule(path)  # type: ignore[assignment]
    calls = [c for i in range(len(blocks)) if (c := run.of(f"{path}.{i}")) is not None]
    joined = all(same(a.results[0], b.given) for a, b in pairwise(calls))
    if len(calls) != len(blocks) or not joined:
        raise InputError("its layers do not hand on one stream, each to the next")
    return path, calls


def _embedding(run: Signals, path: str, first: Tensor) -> tuple[tuple[str, ...], bool]:
    """The tables whose rows add up to the first point of the stream, and whether the first multiplies by its width's root."""
    table = run.model.get_input_embeddings()  # type: ignore[operator]
    found = [
        c
        for c in run.calls
        if isinstance(c.module, nn.Embedding) and not c.name.startswith(f"{path}.")
    ]
    calls = sorted(found, key=lambda c: c.module is not table)  # stable: tokens first
    if table is None or not calls or calls[0].module is not table:
        raise InputError("its tokens are not looked up in a table")
    if any(c.gave.shape[-1] != first.shape[-1] for c in calls) or not same(
        sum((c.gave.expand_as(first) for c in calls), torch.zeros_like(first)), first
    ):
        raise InputError("its stream does not begin with the sum of the rows of its tables")
    rows = calls[0].module.get_parameter("weight")[run.ids]
    factor = float((calls[0].gave * rows).sum() / rows.square().sum())
    scaled = abs(factor - 1) > SCALE
    kept = (rows.shape[-1] ** 0.5, scale_of(table))
    if scaled and any(abs(factor / number - 1) > SCALE for number in kept):
        raise InputError(
            f"its table multiplies what it looks up by {factor:.4g}, which is not the root of its width"
        )
    return tuple(c.name for c in calls), scaled


def _ending(run: Signals, path: str, last: Tensor) -> tuple[Call, Call]:
    """The final norm, which reads the stream, and the head, which reads the norm."""
    own = run.model.get_output_embeddings()  # type: ignore[operator]
    head = next((c for c in run.calls if c.module is own), None)
    if head is None or not isinstance(own, nn.Linear):
        raise InputError("it has no linear head over the vocabulary")
    norms = [c for c in run.calls if not c.name.startswith(f"{path}.") and is_norm(c.module)]
    for norm in norms:
        if same(norm.gave, head.given) and same(norm.given, last):
            return norm, head
    raise InputError(
        "no norm stands between its last layer and its head, or something else does too"
    )


def _rotary(run: Signals, path: str, layers: list[Call]) -> str | None:
    """The module that gives the layers their rotary positions."""
    given = [c.kwargs.get("position_embeddings") for c in layers]
    if all(angles is None for angles in given):
        return None
    angles = list(tensors([given[0]]))
    for call in run.calls:
        outside = not call.name.startswith(f"{path}.") and len(call.results) == len(angles)
        if outside and all(map(same, call.results, angles)):
            return call.name
    raise InputError("no module gives its layers their rotary positions")


def _check_all_placed(model: nn.Module, known: set[str]) -> None:
    left = sorted({n.rpartition(".")[0] for n, _ in model.named_parameters()} - known)
    if left:
        said = ", ".join(f"'{n}'" for n in left[:4])
        raise InputError(f"weights without a place in the grammar: {said}")
