"""Weights changed by what a description says, and nothing else: gains folded, an element of every space applied.

One tensor at a time, in float64, so that a model can be turned while it streams by.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from ..derive.record import weights_of
from .check import untied
from .description import Description, Flat, FlatAxis, Kind, Space
from .elements import Element, blocks
from .pattern import RIGID, Pattern, Power, Symbol, expand

MATRICES = {Kind.GL, Kind.O, Kind.O1, Kind.C}


@dataclass(frozen=True)
class Side:
    """Where one space lies on one axis with one power: queries or keys of a fused axis are two sides."""

    parameter: str
    dims: tuple[int, ...]
    space: str
    powers: tuple[Power, ...]


@dataclass(frozen=True)
class Turner:
    """What becomes of each parameter.

    ``gains``: the values of all gains before anything changed. ``without``: a side that stays as it is (a control).
    """

    flat: Flat
    elements: Mapping[str, Element] = field(repr=False)
    gains: Mapping[str, Tensor] = field(repr=False)
    without: Side | None = None

    def __call__(self, name: str, value: Tensor) -> Tensor:
        """The new value, in its own dtype."""
        new = value.detach().double().clone()
        gain = self.flat.gains.get(name)
        folded = gain is not None and gain.folded
        axes = self.flat.of.get(name, ())
        if folded:
            assert gain is not None
            new.fill_(1.0 - gain.offset)
        for a in axes:
            self._fold(a, new)
        for a in axes:
            for label in a.axis.labels:
                new = self._label(a, label, new, folded)
        return new.to(value.dtype)

    def _fold(self, a: FlatAxis, value: Tensor) -> None:
        for f in a.axis.folds:
            gain = self.flat.gains[a.gain(f)]
            g = self.gains[a.gain(f)].double().flatten() + gain.offset
            size = [value.shape[d] for d in a.axis.dims]
            if f.entries:
                parts = [
                    torch.ones(len(c)) if s == RIGID else g[torch.from_numpy(c)]
                    for s, c in expand(f.entries)
                ]
                g = torch.cat([p.double() for p in parts]).reshape(size)
            shape = [1] * value.dim()
            for d in a.axis.dims if f.entries else a.axis.dims[-1:]:
                shape[d] = value.shape[d]
            value.mul_(g.reshape(shape) ** f.power)

    def _label(self, a: FlatAxis, label: Pattern, value: Tensor, folded: bool) -> Tensor:
        sides = {
            s: at
            for s, at in positions(a, label, self.elements).items()
            if Side(a.parameter, a.axis.dims, a.space(s), s.powers) != self.without
        }
        if not sides:
            return value
        lead = a.axis.dims
        rest = [d for d in range(value.dim()) if d not in lead]
        moved = value.permute(*lead, *rest)
        shape = moved.shape
        W = moved.reshape(int(np.prod(shape[: len(lead)])), -1)
        for name in {a.space(s) for s in sides}:
            mine = {s: at for s, at in sides.items() if a.space(s) == name}
            W = self._space(a, self.flat.spaces[name], self.elements[name], mine, W, folded)
        back = np.argsort([*lead, *rest]).tolist()
        return W.reshape(shape).permute(*back)

    def _space(
        self,
        a: FlatAxis,
        space: Space,
        element: Element,
        sides: Mapping[Symbol, tuple[np.ndarray, np.ndarray]],
        W: Tensor,
        folded: bool,
    ) -> Tensor:
        if element.matrices is not None and not folded:
            for symbol, (positions, codes) in sides.items():
                M = element.matrices
                if symbol.powers == (-1,):
                    M = torch.linalg.inv(M).mT
                each = blocks(space)
                for at in occurrences(positions, codes, space.width):
                    b = torch.from_numpy(at[each])
                    W[b] = torch.einsum("cab,cbr->car", M, W[b])
        if element.permutation is not None:
            positions = np.concatenate([p for p, _ in sides.values()])
            codes = np.concatenate([c for _, c in sides.values()])
            source = permuted(positions, codes, element.permutation)
            W[torch.from_numpy(np.sort(positions))] = W[torch.from_numpy(source)]
        for symbol, (positions, codes) in sides.items():
            i, c = torch.from_numpy(positions), torch.from_numpy(codes)
            for k, (letter, s) in enumerate(zip(space.scales, element.scales, strict=True)):
                power = float((symbol.powers or (1,))[k if len(symbol.powers) > 1 else 0])
                factor = s[c] ** (power % 2 if letter == "±" else power)
                W[i] = W[i] * factor[:, None]
        return W


def positions(
    a: FlatAxis, label: Pattern, spaces: Container[str]
) -> dict[Symbol, tuple[np.ndarray, np.ndarray]]:
    """Of each symbol of these spaces: positions on the axis, and their codes."""
    found: dict[Symbol, list[tuple[int, np.ndarray]]] = {}
    p = 0
    for symbol, codes in expand(label):
        if symbol != RIGID and a.space(symbol) in spaces:
            found.setdefault(symbol, []).append((p, codes))
        p += len(codes)
    return {
        s: (
            np.concatenate([np.arange(q, q + len(c)) for q, c in parts]),
            np.concatenate([c for _, c in parts]),
        )
        for s, parts in found.items()
    }


def occurrences(positions: np.ndarray, codes: np.ndarray, width: int) -> Iterator[np.ndarray]:
    """The position of each coordinate: the first one of each, the second, and so on."""
    order = np.lexsort((positions, codes))
    times = len(codes) // width
    yield from positions[order].reshape(width, times).T


def permuted(positions: np.ndarray, codes: np.ndarray, permutation: np.ndarray) -> np.ndarray:
    """Of each position in rising order, where what comes there was: the k-th of its coordinate for the k-th."""
    order = np.argsort(positions, kind="stable")
    positions, codes = positions[order], codes[order]
    nth = np.zeros(len(codes), np.int64)
    by_code = np.argsort(codes, kind="stable")
    sorted_codes = codes[by_code]
    starts = np.r_[0, np.flatnonzero(np.diff(sorted_codes)) + 1]
    nth[by_code] = np.arange(len(codes)) - np.repeat(starts, np.diff(np.r_[starts, len(codes)]))
    key = {
        (c, n): p for c, n, p in zip(codes.tolist(), nth.tolist(), positions.tolist(), strict=True)
    }
    return np.array(
        [key[int(permutation[c]), n] for c, n in zip(codes.tolist(), nth.tolist(), strict=True)]
    )


def turn(
    model: nn.Module,
    description: Description,
    elements: Mapping[str, Element],
    without: Side | None = None,
) -> None:
    """Changes the model's weights in place; its logits stay, unless a side is left out."""
    untied(model, description)
    flat = description.flat()
    named = weights_of(model)
    gains = {n: named[n].detach().clone() for n in flat.gains}
    turner = Turner(flat, elements, gains, without)
    with torch.no_grad():
        for name, p in named.items():
            p.copy_(turner(name, p))


def sides(description: Description, space: str) -> list[Side]:
    """All sides of a space where leaving it out would change a weight."""
    flat = description.flat()
    found = dict[Side, None]()
    for a in flat.carrying(space):
        gain = flat.gains.get(a.parameter)
        kind = flat.spaces[space].kind
        if gain is not None and gain.folded and kind in MATRICES | {Kind.PERM}:
            continue
        for label in a.axis.labels:
            for symbol, _ in expand(label):
                idle = kind is Kind.SCALE and not any(symbol.powers or (1,))
                if symbol != RIGID and a.space(symbol) == space and not idle:
                    found[Side(a.parameter, a.axis.dims, space, symbol.powers)] = None
    return list(found)
