"""What a description needs of a derivation, as plain arrays."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor, nn

from ..derive.analysis import Derived
from ..derive.arrays import core, line, varies
from ..derive.block import Block
from ..derive.record import weights_of

LAYER = re.compile(r"^(.*?\.)(\d+)\.(.*)$")
Axis = tuple[str, int]  # a parameter and a dim
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
class Scales:
    """Free scales of some roots: a column a generator, the power of each root. Signs count modulo 2."""

    roots: tuple[int, ...]
    basis: np.ndarray  # [roots, generators]


@dataclass(frozen=True)
class Source:
    """A derivation as arrays over the ids of coordinates."""

    fields: Mapping[Axis, Tensor]  # ids along an axis, of the parameter's shape
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
    readers: frozenset[int]  # ids of weights that something was contracted with


@dataclass(frozen=True)
class Line:
    """The ids along one axis (of a stack: of all its slices, one after the other)."""

    parameter: str
    dims: tuple[int, ...]
    ids: np.ndarray = field(repr=False)

    @property
    def key(self) -> Key:
        return self.parameter, self.dims

    @property
    def axis(self) -> Axis:
        return self.parameter, self.dims[-1]

    @property
    def home(self) -> tuple[str, int] | None:
        return Split.of(self.parameter).home


def source(
    derived: Derived,
    model: nn.Module,
    blocks: Iterable[Block] | None = None,
    scales: bool = True,
) -> Source:
    """A derivation of a model; only these blocks of it (those that were certified), scales or none."""
    ids, n = derived.ids, len(derived.ids.parent)
    found = [ids.scale(a) for a in range(n)]
    free = derived.scales
    return Source(
        fields=derived.axes,
        shapes={name: tuple(p.shape) for name, p in weights_of(model).items()},
        root=np.fromiter(map(ids.root, range(n)), np.int64, n),
        scale_root=np.fromiter((r for r, _ in found), np.int64, n),
        scale_sign=np.fromiter((s for _, s in found), np.int64, n),
        blocks=tuple(derived.blocks if blocks is None else blocks),
        logs=tuple(Scales(roots, basis) for roots, basis in free.logs) if scales else (),
        signs=tuple(Scales(roots, basis.T) for roots, basis in free.signs) if scales else (),
        folds={a: (f.name, f.index, f.power) for a, f in derived.folds.items()},
        gains={n: (offset, n not in derived.unfolded) for n, offset in derived.gains.items()},
        unseen=derived.unseen,
        readers=derived.contracted,
    )


def lines(source: Source) -> list[Line]:
    """Every axis that carries coordinates, in the order in which the model came to them."""
    made = []
    for (name, _), f in source.fields.items():
        dims = varies(core(f))
        if dims:
            made.append(Line(name, dims, line(f).numpy()))
    return made


def first_seen(values: np.ndarray) -> np.ndarray:
    """Unique values in the order in which they come first."""
    u, at = np.unique(values, return_index=True)
    ordered: np.ndarray = u[np.argsort(at)]
    return ordered
