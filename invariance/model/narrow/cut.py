"""Coordinates of spaces cut out of a model in place: the modules stay the family's own, only narrower.

A cut computes what the model computes whose coordinates are zero: norms go on dividing by the old width. It is tried on
an input before it counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..derive.trace import Example
from ..described.description import Description, Flat, FlatAxis, Kind
from ..described.elements import blocks
from ..described.pattern import expand
from ..described.weightless import on_meta, stored
from .attributes import extents, moved, note, whole_numbers
from .keys import Change
from .norms import Norm
from .positions import Kept, Narrowing, narrowed, narrowings, shapes, zeroed
from .renorm import norms_of, renorm
from .spoken import Changes, Search, search
from .stock import speak


class Way(Enum):
    """How modules learn of their new widths; the first that computes what zeros compute is taken."""

    SAID = "the config says them"
    HELD = "they hold them as a model of such a config does, and the config stays"
    FOUND = "those that own what was cut note its extents"
    FOLLOWED = "all that a key of such a width moves is moved"
    COUNTED = "modules around what was cut count fewer heads"
    JOINED = "and note the width of all heads together"


@dataclass(frozen=True)
class Plan:
    """What is to go, and which config says so."""

    narrowings: tuple[Narrowing, ...] = field(repr=False)
    base: PreTrainedModel = field(repr=False)  # on meta
    search: Search = field(repr=False)
    norms: Mapping[str, tuple[Norm, str]] = field(repr=False)
    heads: bool = False  # whether whole heads go

    def ways(self) -> tuple[Way, ...]:
        if self.search.said is not None:
            return Way.SAID, Way.HELD
        return Way.FOUND, Way.FOLLOWED, *((Way.COUNTED, Way.JOINED) if self.heads else ())


@dataclass(frozen=True)
class Cut:
    """What a cut did. ``changes``: what the config says of it; empty where it cannot say it.

    ``replaced``: modules that the family's own class could not be.
    """

    narrowed: tuple[Narrowing, ...] = field(repr=False)
    changes: tuple[Change, ...]
    replaced: tuple[str, ...]
    way: Way


def zero(model: nn.Module, description: Description, kept: Kept) -> None:
    """All that a cut would delete becomes zero: gains of norms too, so that nothing comes out there."""
    flat, named = description.flat(), stored(model)
    with torch.no_grad():
        for n in narrowings(description, model, kept):
            gain = flat.gains.get(n.parameter)
            value = zeroed(named[n.parameter], n, -gain.offset if gain is not None else 0.0)
            named[n.parameter].copy_(value)


def plan(
    model: PreTrainedModel,
    description: Description,
    kept: Kept,
    example: Example,
    but: Set[Changes] = frozenset(),
) -> Plan:
    """What a cut will do. ``example``: an input, to see which modules are norms of what; ``but``: as of ``search``."""
    found = narrowings(description, model, kept)
    base = on_meta(model.config, type(model))
    target = shapes(model, found)
    flat = description.flat()
    norms = norms_of(model, flat, found, kept, example)
    heads = any(flat.spaces[n].kind is Kind.SWAP and n.startswith("heads") for n in kept)
    return Plan(tuple(found), base, search(model.config, base, target, but), norms, heads)


def cut(model: PreTrainedModel, description: Description, kept: Kept, plan: Plan, way: Way) -> Cut:
    """Deletes what is not kept, in place."""
    flat, said = description.flat(), plan.search.said
    was = shapes(model, [])
    known = extents([model, plan.base, *([] if said is None else [said.model])])
    _narrow(model, plan.narrowings)
    replaced = [
        name
        for name, norm in plan.norms.items()
        if renorm(model, name, norm, flat, kept, plan.narrowings)
    ]
    note(model, was, known)
    if said is not None:
        _hold(model, plan.base, said.model, flat, kept)
    if said is not None and way is Way.SAID:
        for change in said.changes:
            setattr(change.key.holder(model.config), change.key.name, change.value)
        speak(model)
    if way is Way.FOLLOWED:
        _follow(model, plan)
    if way in (Way.COUNTED, Way.JOINED):
        _count(model, flat, kept, plan.narrowings, way is Way.JOINED)
    changes = said.changes if said is not None and way is Way.SAID else ()
    return Cut(plan.narrowings, changes, tuple(replaced), way)


def _narrow(model: nn.Module, found: Sequence[Narrowing]) -> None:
    """Slices of a stack before the stack itself, whose slices are counted as they were."""
    named = stored(model)
    done = set[tuple[int, int]]()
    for n in sorted(found, key=lambda n: -len(n.dims)):
        p = named[n.parameter]
        if (id(p), n.dim) not in done:
            done.add((id(p), n.dim))
            p.data = narrowed(p.data, n)


def _hold(model: nn.Module, base: nn.Module, other: nn.Module, flat: Flat, kept: Kept) -> None:
    """The whole numbers and the buffers that modules hold, as the other model has them."""
    modules = dict(model.named_modules())
    for (name, attribute), (_, value) in moved(base, other).items():
        setattr(modules[name], attribute, value)
    now = dict(other.named_buffers())
    for name, buffer in base.named_buffers():
        if name in now and now[name].shape != buffer.shape:
            for d, (o, n) in enumerate(zip(buffer.shape, now[name].shape, strict=True)):
                if o != n and name not in stored(model):
                    narrow_buffer(model, name, d, stay(o, n, flat, kept))


def _follow(model: nn.Module, plan: Plan) -> None:
    """What keys that say a part of the widths move from an old width to a new one."""
    for twin in plan.search.partly:
        for (name, attribute), change in moved(plan.base, twin).items():
            if change in plan.search.pairs:
                setattr(model.get_submodule(name), attribute, change[1])


def _count(
    model: nn.Module, flat: Flat, kept: Kept, found: Sequence[Narrowing], joined: bool
) -> None:
    """Modules that hold matrices of heads, or such modules, note how many there are now; where ``joined``, also the
    width of all of them."""
    numbers = dict[str, dict[int, int]]()
    for n in found:
        if flat.spaces[n.space].kind is not Kind.SWAP or n.stay.ndim != 1:
            continue
        owner = n.parameter.rpartition(".")[0].rpartition(".")[0]
        was, now = len(n.stay) + len(n.go), len(n.stay)
        for a in flat.of[n.parameter]:
            codes = {int(c) for c in _things(a, n.space)} if a.axis.dims == n.dims else set()
            if codes:
                own = numbers.setdefault(owner, {})
                own[len(codes)] = len(codes & set(kept[n.space].tolist()))
                if joined:
                    own[was] = now
    for name, changes in numbers.items():
        module = model.get_submodule(name)
        for attribute, value in whole_numbers(module).items():
            if value in changes:
                setattr(module, attribute, changes[value])


def _things(a: FlatAxis, space: str) -> np.ndarray:
    """The heads along an axis."""
    each = [c for label in a.axis.labels for s, c in expand(label) if a.space(s) == space]
    return np.concatenate(each) if each else np.zeros(0, np.int64)


def narrow_buffer(model: nn.Module, name: str, dim: int, index: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    held = getattr(module, leaf)
    if held is not None:
        setattr(module, leaf, held.index_select(dim, index))


def stay(was: int, now: int, flat: Flat, kept: Kept) -> Tensor:
    """What stays of a buffer: as of the space of its width, or of the pairs of the first head."""
    for name, codes in kept.items():
        space = flat.spaces[name]
        if space.width == was and len(codes) == now:
            return torch.from_numpy(np.sort(codes))
        if space.kind is Kind.C:
            pairs = np.isin(blocks(space)[:was, 0], codes)
            if len(pairs) == was and pairs.sum() == now:
                return torch.from_numpy(np.flatnonzero(pairs))
    return torch.arange(now)
