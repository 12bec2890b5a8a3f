"""The points of the stream in order: which writers each reader has seen.

Every op hands on which weights its inputs came from. What a reader's input came from says where in the stream it stands;
layers that read one point side by side and layers that read one after the other are told apart.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..derive.precision import double, in_double
from ..derive.record import weights_of
from ..derive.trace import Example, forward, tensors_in
from .description import Point
from .source import Key, Line, Source, Split
from .spaces import Draft

INPUT = ""  # the origin of what depends on the model's input
Seen = frozenset[str]


class Origins(TorchDispatchMode):
    """Of each weight, what the first activation that met it had come from."""

    def __init__(self, model: nn.Module, example: Example) -> None:
        super().__init__()
        self.of: dict[int, Seen] = {
            _storage(t): frozenset((INPUT,)) for t in tensors_in(example.values())
        }
        self.of |= {_storage(p): frozenset((n,)) for n, p in weights_of(model).items()}
        self.seen: dict[str, Seen] = {}
        self._kept: list[Tensor] = []  # so that no storage's address is used twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = in_double(func, args, kwargs)
        came = {_storage(t) for t in tensors_in((*args, *kwargs.values()))}
        origins = [self.of.get(s, frozenset()) for s in came]
        active = frozenset[str]().union(*(o for o in origins if INPUT in o))
        weights = frozenset[str]().union(*(o for o in origins if INPUT not in o))
        if active:
            for name in weights:
                self.seen.setdefault(name, active)
        for t in tensors_in(out if isinstance(out, (list, tuple)) else (out,)):
            self.of[_storage(t)] = (
                self.of.get(_storage(t), frozenset()) | active | weights
                if (_storage(t) in came)
                else active | weights
            )
            self._kept.append(t)
        return out


def _storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def points(
    source: Source,
    axes: Sequence[Line],
    drafts: Iterable[Draft],
    model: nn.Module,
    example: Example,
) -> Mapping[Key, tuple[Point, ...]]:
    """Where each axis meets the stream: a space of several layers that matrices mix or permutations move.

    In a layer, points are counted from its first reader; a writer's is the first that sees what it wrote. Outside of
    layers there are the first point, 0, and the last, -1. Where readers do not see ever more, nothing is said.
    """
    with double(), Origins(model, example) as origins:
        forward(model, example)
    made: dict[Key, tuple[Point, ...]] = {}
    for d in drafts:
        if d.home is None and d.blocks:
            made.update(_of_stream(source, [x for x in axes if x.key in d.codes], origins.seen))
    return made


def _of_stream(
    source: Source, axes: Sequence[Line], seen: Mapping[str, Seen]
) -> Mapping[Key, tuple[Point, ...]]:
    axes = [x for x in axes if x.parameter in seen and not _of_norm(source, x)]
    tables = {x.key for x in axes if seen[x.parameter] == {INPUT}}  # rows that tokens looked up
    readers = [x for x in axes if int(x.ids[0]) in source.readers and x.key not in tables]
    writers = [x for x in axes if int(x.ids[0]) not in source.readers or x.key in tables]
    wrote = {x.parameter for x in writers}
    sets = sorted({seen[x.parameter] & wrote for x in readers}, key=len)
    if any(not a < b for a, b in itertools.pairwise(sets)):
        return {}
    number = {x.key: sets.index(seen[x.parameter] & wrote) for x in readers}
    for x in writers:
        after = [i for i, s in enumerate(sets) if x.parameter in s]
        if after:
            number[x.key] = after[0]
    base = dict[object, int]()
    for x in readers:
        home = Split.of(x.parameter).home
        base[home] = min(number[x.key], base.get(home, len(sets)))
    made = {}
    for x in axes:
        if x.key in number:
            n = number[x.key]
            home = Split.of(x.parameter).home
            if home is not None and home in base:
                made[x.key] = (Point(x in writers, n - base[home]),)
            elif home is None and n in (0, len(sets) - 1):
                made[x.key] = (Point(x in writers, 0 if n == 0 else -1),)
    return made


def _of_norm(source: Source, line: Line) -> bool:
    """A gain, or the bias beside it: they stand between the stream and its readers."""
    if line.parameter in source.gains:
        return True
    fold = source.folds.get(int(line.ids[0]))
    return fold is not None and fold[2] < 0
