"""Stacks of experts are depth too: a few are traced at full width, and what they show is stretched to all."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from torch import nn
from transformers import PretrainedConfig

from .description import Axis, Description, Kind, Part, Space
from .pattern import Loop, Node, Pattern, Run
from .weightless import on_meta, stored

FEW = (8, 16, 32)  # a number that exceeds the experts of a token is looked for in this order


@dataclass(frozen=True)
class Fewer:
    """A config with ``few`` of ``all`` experts in every stack."""

    config: PretrainedConfig
    few: int
    all: int


def stack_sizes(model: nn.Module) -> set[int]:
    """How many matrices lie in each stack of them."""
    return {p.shape[0] for p in model.parameters() if p.dim() == 3}


def fewer(config: PretrainedConfig, full: nn.Module) -> Iterator[Fewer]:
    """Configs with few experts: a key of the config that holds their number is found by changing it."""
    text = config.get_text_config()
    for count in sorted(stack_sizes(full), reverse=True):
        for key in [k for k, v in vars(text).items() if type(v) is int and v == count]:
            for few in (f for f in FEW if f < count):
                made = copy.deepcopy(config)
                setattr(made.get_text_config(), key, few)
                if _only_stacks(full, made, count, few):
                    yield Fewer(made, few, count)


def _only_stacks(full: nn.Module, config: PretrainedConfig, count: int, few: int) -> bool:
    """Whether the change shortens all stacks of that size, and changes nothing else but first axes."""
    try:
        model = on_meta(config)
    except (ValueError, TypeError, RuntimeError, AssertionError):
        return False
    now = stored(model)
    was = stored(full)
    if now.keys() != was.keys() or count in stack_sizes(model):
        return False
    return all(
        now[n].shape == p.shape or (now[n].shape[0], *p.shape[1:]) == (few, *now[n].shape[1:])
        for n, p in was.items()
    )


def stretch(description: Description, few: int, all: int) -> Description:
    """What ``few`` experts show, said of ``all``."""
    return replace(
        description,
        whole=_part(description.whole, few, all),
        layers=tuple(_part(p, few, all) for p in description.layers),
    )


def _part(part: Part, few: int, all: int) -> Part:
    stacked = {a.parameter for a in part.axes if a.dims == (0, 1) or a.dims == (0, 2)}
    inside = {
        s
        for a in part.axes
        if a.parameter in stacked and len(a.dims) == 2
        for label in a.labels
        for s in _told(label)
    }
    wider = {
        s.name: s.width // few * all
        for s in part.spaces
        if (s.copies == few and s.name in inside) or (s.kind is Kind.SWAP and s.width == few)
    }
    spaces = tuple(_space(s, few, all) if s.name in wider else s for s in part.spaces)
    widths = {s.name: s.width for s in part.spaces}
    return replace(
        part, spaces=spaces, axes=tuple(_axis(a, few, all, widths, wider) for a in part.axes)
    )


def _told(pattern: Pattern) -> Iterator[str]:
    for n in pattern:
        if isinstance(n, Loop):
            yield from _told(n.body)
        else:
            yield n.symbol.space


def _space(s: Space, few: int, all: int) -> Space:
    moves = s.moves
    if s.kind is Kind.SWAP:  # the first with each other one
        moves = tuple(((0, i),) for i in range(1, all))
    return replace(
        s,
        width=s.width // few * all,
        copies=all if s.copies == few else s.copies,
        blocks=tuple(_times(n, few, all) for n in s.blocks),
        moves=moves,
    )


def _axis(a: Axis, few: int, all: int, widths: Mapping[str, int], wider: Mapping[str, int]) -> Axis:
    if len(a.dims) == 2:
        labels = tuple(_label(label, few, all, widths, wider) for label in a.labels)
    else:
        labels = tuple(tuple(_wide(n, widths, wider) for n in label) for label in a.labels)
    return replace(a, labels=labels)


def _label(
    label: Pattern, few: int, all: int, widths: Mapping[str, int], wider: Mapping[str, int]
) -> Pattern:
    """A stack's label: whatever goes around its slices goes around more of them."""
    if len(label) == 1 and isinstance(label[0], Loop) and label[0].count == few:
        return (replace(label[0], count=all),)
    if len(label) == 1 and isinstance(label[0], Run):
        return (_wide(label[0], widths, wider),)
    raise ValueError("a stack's slices are not alike")


def _wide(node: Node, widths: Mapping[str, int], wider: Mapping[str, int]) -> Node:
    """A run of a whole space is one of the whole wider space."""
    if (
        isinstance(node, Run)
        and node.symbol.space in wider
        and node.count == widths[node.symbol.space]
    ):
        return replace(node, count=wider[node.symbol.space])
    return node


def _times(node: Node, few: int, all: int) -> Node:
    return replace(node, count=all) if isinstance(node, Loop) and node.count == few else node
