"""Which entries of every parameter stay when coordinates of spaces go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from ...core.errors import InputError
from ..described.description import Description, Flat, FlatAxis, Kind
from ..described.pattern import RIGID, expand
from ..described.weightless import stored

Kept = Mapping[str, np.ndarray]  # of a space by its full name, the coordinates that stay


@dataclass(frozen=True)
class Narrowing:
    """Along one dim of a parameter, what stays: [kept], or [slices, kept] along the dim of every slice."""

    parameter: str
    dims: tuple[int, ...]
    space: str
    stay: np.ndarray = field(repr=False)
    go: np.ndarray = field(repr=False)

    @property
    def dim(self) -> int:
        return self.dims[-1]


def narrowings(description: Description, model: nn.Module, kept: Kept) -> list[Narrowing]:
    """Every axis that loses positions. Raises InputError where slices of a stack would lose different numbers."""
    flat, named = description.flat(), stored(model)
    for name in kept:
        if name not in flat.spaces:
            raise InputError(
                f"cut: there is no space {name}; known: {', '.join(sorted(flat.spaces))}."
            )
    made = []
    for a in flat.axes.values():
        found = _gone(a, flat, kept)
        if found is None:
            continue
        gone, space = found
        shape = [named[a.parameter].shape[d] for d in a.axis.dims]
        rows = gone.reshape(-1, shape[-1])
        counts = set((~rows).sum(1).tolist())
        if len(counts) > 1:
            raise InputError(
                f"cut: {a.parameter} would keep different widths in its slices. Keep as many in each of them."
            )
        stay = np.stack([np.flatnonzero(~row) for row in rows])
        go = np.stack([np.flatnonzero(row) for row in rows])
        single = len(a.axis.dims) == 1
        made.append(
            Narrowing(
                a.parameter,
                a.axis.dims,
                space,
                stay[0] if single else stay,
                go[0] if single else go,
            )
        )
    return made


def _gone(a: FlatAxis, flat: Flat, kept: Kept) -> tuple[np.ndarray, str] | None:
    """Of each position, whether it goes, and with which space; None where all stay."""
    total, by = None, ""
    for label in a.axis.labels:
        parts = list(expand(label))
        names = {a.space(s) for s, _ in parts if s != RIGID} & kept.keys()
        names = {n for n in names if flat.spaces[n].kind is not Kind.SCALE}
        if not names:
            continue
        gone = [
            ~np.isin(codes, kept[a.space(s)])
            if s != RIGID and a.space(s) in names
            else np.zeros(len(codes), bool)
            for s, codes in parts
        ]
        mask = np.concatenate(gone)
        total = mask if total is None else total | mask
        by = sorted(names)[0]
    return None if total is None or not total.any() else (total, by)


def narrowed(value: Tensor, n: Narrowing) -> Tensor:
    """The entries that stay."""
    if n.stay.ndim == 1:
        return value.index_select(n.dim, torch.from_numpy(n.stay)).contiguous()
    shape = [1] * value.dim()
    shape[0], shape[n.dim] = n.stay.shape
    index = torch.from_numpy(n.stay).reshape(shape)
    return value.gather(
        n.dim,
        index.expand(*(n.stay.shape[1] if d == n.dim else s for d, s in enumerate(value.shape))),
    )


def zeroed(value: Tensor, n: Narrowing, to: float = 0.0) -> Tensor:
    """The same with entries that go set to a number."""
    mask = torch.zeros((*n.stay.shape[:-1], value.shape[n.dim]), dtype=torch.bool)
    mask.scatter_(-1, torch.from_numpy(n.go), True)
    shape = [1] * value.dim()
    shape[n.dim] = value.shape[n.dim]
    if n.stay.ndim == 2:
        shape[0] = value.shape[0]
    return value.masked_fill(mask.reshape(shape), to)


def shapes(model: nn.Module, found: Sequence[Narrowing]) -> dict[str, tuple[int, ...]]:
    """The shapes of all parameters, by each of their names, when positions have gone."""
    made = {name: list(p.shape) for name, p in stored(model).items()}
    for n in found:
        made[n.parameter][n.dim] = n.stay.shape[-1]
    return {name: tuple(s) for name, s in made.items()}
