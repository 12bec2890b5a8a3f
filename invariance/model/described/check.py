"""A description against the model that it is said to be of: every parameter, every axis."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

import numpy as np
from torch import nn

from ...core.errors import InputError
from .description import Description, Flat, FlatAxis, Kind
from .pattern import RIGID, expand, length
from .weightless import stored

Shapes = Mapping[str, tuple[int, ...]]


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Of every parameter, by each of its names; a model on meta will do."""
    return {name: tuple(p.shape) for name, p in stored(model).items()}


def untied(model: nn.Module, description: Description, where: str = "the model") -> None:
    """Raises InputError where one parameter is described under two names: each would be changed in its own way."""
    first = dict[int, str]()
    for name, p in stored(model).items():
        if name in description.flat().parameters() and first.setdefault(id(p), name) != name:
            raise InputError(
                f"{where}: {name} and {first[id(p)]} are one parameter, and a change of basis changes them apart. "
                "Untie them first: give the output head a weight of its own."
            )


def check(description: Description, model: nn.Module, file: str = "layout") -> None:
    """Raises InputError, naming file, parameter and axis, unless every parameter of the model is as described."""
    flat, found = description.flat(), shapes(model)
    known = flat.parameters()
    own = stored(model)
    described = {id(own[n]) for n in known if n in own}
    for what, names in (
        ("has no parameter", known - set(found)),
        ("is described without its parameter", {n for n in found if id(own[n]) not in described}),
    ):
        if names:
            raise InputError(
                f"{file}: the model {what} {sorted(names)[0]} ({len(names)} in all). Derive the layout anew."
            )
    for space in {id(s): s for s in flat.spaces.values()}.values():
        if space.blocks:
            codes = np.sort(np.concatenate([c for _, c in expand(space.blocks)]))
            if len(codes) != space.width or (codes != np.arange(space.width)).any():
                raise InputError(
                    f"{file}: the blocks of {space.name} are not its {space.width} coordinates."
                )
    done = set[object]()
    for a in flat.axes.values():
        sizes = tuple(found[a.parameter])
        key = (a.axis, sizes, tuple(found.get(a.gain(f), ()) for f in a.axis.folds))
        if key not in done:
            _check_axis(a, flat, found, file)
            done.add(key)


def _check_axis(a: FlatAxis, flat: Flat, found: Shapes, file: str) -> None:
    where = f"{file}: {a.parameter}, axis {'.'.join(map(str, a.axis.dims))}"
    shape = found[a.parameter]
    if any(d >= len(shape) for d in a.axis.dims):
        raise InputError(f"{where}: the parameter has {len(shape)} axes. Derive the layout anew.")
    size = math.prod(shape[d] for d in a.axis.dims)
    for label in a.axis.labels:
        n = length(label)
        if n and n != size:
            raise InputError(
                f"{where}: {n} positions described, {size} there. Derive the layout anew."
            )
        counts: dict[tuple[str, object], Counter[int]] = {}
        for symbol, codes in expand(label):
            if symbol == RIGID:
                continue
            space = flat.spaces.get(a.space(symbol))
            if space is None or (len(codes) and not 0 <= codes.min() <= codes.max() < space.width):
                raise InputError(
                    f"{where}: {symbol} is no coordinate of a space. Derive the layout anew."
                )
            if space.kind not in (Kind.SCALE, Kind.SWAP):
                powers = symbol.powers if space.kind is Kind.GL or space.kind is Kind.C else ()
                counts.setdefault((a.space(symbol), powers), Counter()).update(codes.tolist())
        for (name, _), c in counts.items():
            if len(c) != flat.spaces[name].width or len(set(c.values())) > 1:
                raise InputError(
                    f"{where}: not every coordinate of {name} is there as often as the others."
                )
    for fold in a.axis.folds:
        gain = found.get(a.gain(fold))
        entries = [c for s, c in expand(fold.entries) if s != RIGID]
        last = max((int(c.max()) for c in entries), default=shape[a.axis.dims[-1]] - 1)
        if gain is None or a.gain(fold) not in flat.gains or last >= math.prod(gain):
            raise InputError(f"{where}: takes up {a.gain(fold)}, which is no gain of that width.")
        if fold.entries and length(fold.entries) != size:
            raise InputError(f"{where}: the entries of {a.gain(fold)} are not one a position.")
