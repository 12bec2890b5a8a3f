"""What a description needs of a derivation, as plain arrays."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from .description import Kind

LAYER = re.compile(r"^(.*?\.)(\d+)\.(.*)$")
Key = tuple[str, tuple[int, ...]]  # a parameter, and dims of it


@dataclass(frozen=True)
class Split:
    """A parameter's name: its layer's prefix and number, if it lies in one, and the rest."""

    prefix: str
    layer: int | None
    rest: str

    @staticmethod
    def of(name: str) -> Split:
        m = LAYER.match(name)
        return Split(m[1], int(m[2]), m[3]) if m else Split("", None, name)

    @property
    def home(self) -> tuple[str, int] | None:
        return None if self.layer is None else (self.prefix, self.layer)


@dataclass(frozen=True)
class Block:
    """Coordinates (classes, in order) with one element of a group; on which axes; what they are called."""

    kind: Kind
    classes: tuple[int, ...]
    axes: frozenset[tuple[str, int]]  # parameter, number of the field
    stem: str
    maps: tuple[Mapping[int, int], ...] = ()  # SWAP: involutions of ids


@dataclass(frozen=True)
class Scales:
    """Free scales of some roots: a column a generator, the power of each root. Signs count modulo 2."""

    roots: tuple[int, ...]
    basis: np.ndarray  # [roots, generators]


@dataclass(frozen=True)
class Source:
    """A derivation as arrays over the ids of coordinates."""

    fields: Mapping[
        str, tuple[Tensor, ...]
    ]  # of each parameter: ids, of its shape, one array a space
    shapes: Mapping[str, tuple[int, ...]]
    root: np.ndarray  # class of each id
    scale_root: np.ndarray
    scale_sign: np.ndarray
    blocks: tuple[Block, ...]
    logs: tuple[Scales, ...]
    signs: tuple[Scales, ...]
    folds: Mapping[int, tuple[str, int, int]]  # id: gain, entry, power
    gains: Mapping[str, tuple[float, bool]]  # offset, folded
    unseen: tuple[str, ...]


@dataclass(frozen=True)
class Line:
    """The ids along one axis (of a stack: of all its slices, one after the other)."""

    parameter: str
    field: int
    dims: tuple[int, ...]
    ids: np.ndarray = dataclasses.field(repr=False)

    @property
    def key(self) -> Key:
        return self.parameter, self.dims

    @property
    def home(self) -> tuple[str, int] | None:
        return Split.of(self.parameter).home


def stored(f: Tensor) -> Tensor:
    """The part of an expanded tensor that takes memory."""
    for d in range(f.dim()):
        if f.shape[d] > 1 and f.stride(d) == 0:
            f = f.narrow(d, 0, 1)
    return f


def lines(source: Source) -> list[Line]:
    """Every axis that carries coordinates, in the order in which the model came to them."""
    made = []
    for name, fields in source.fields.items():
        for k, f in enumerate(fields):
            c = stored(f)
            dims = tuple(
                d for d in range(c.dim()) if c.shape[d] > 1 and bool((c != c.narrow(d, 0, 1)).any())
            )
            if not dims:
                continue
            for d in range(c.dim()):
                if d not in dims:
                    c = c.narrow(d, 0, 1)
            made.append(Line(name, k, dims, c.permute(*dims, *_rest(c, dims)).reshape(-1).numpy()))
    return made


def _rest(c: Tensor, dims: Iterable[int]) -> list[int]:
    return [d for d in range(c.dim()) if d not in set(dims)]


def first_seen(values: np.ndarray) -> np.ndarray:
    """Unique values in the order in which they come first."""
    u, at = np.unique(values, return_index=True)
    ordered: np.ndarray = u[np.argsort(at)]
    return ordered
