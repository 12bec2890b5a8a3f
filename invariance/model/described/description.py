"""What a derived layout says, as data: spaces, and for every axis of every parameter which coordinates lie along it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

from .pattern import Pattern, Symbol, symbols

Move = tuple[tuple[int, int], ...]  # a product of transpositions


class Kind(Enum):
    """The group that acts on the coordinates of a space."""

    GL = "GL"  # invertible matrices, one a block
    O = "O"  # orthogonal matrices
    O1 = "O1"  # orthogonal matrices that fix the vector of ones
    C = "C"  # a turn and a scale of two coordinates, one a block
    PERM = "PERM"  # permutations
    SCALE = "SCALE"  # nothing but scales
    SWAP = "SWAP"  # things (heads, experts) that change places with all that is in them


@dataclass(frozen=True)
class Space:
    """Coordinates with a group. In the layers of a model its name ends in @, which stands for the layer.

    ``scales`` says which scales a coordinate has besides, one letter each: R a positive number, ± a sign.
    ``blocks`` gives the coordinates of one block after the other, where there are several; each has an element of
    its own. Of a SWAP, ``moves`` are the generators: each a product of transpositions.
    """

    name: str
    kind: Kind
    width: int
    copies: int = 1
    blocks: Pattern = ()
    scales: str = ""
    moves: tuple[Move, ...] = ()

    @property
    def local(self) -> bool:
        return self.name.endswith("@")


@dataclass(frozen=True)
class Fold:
    """A gain that this axis takes up: times its entries (power 1) or divided by them (-1).

    ``entries`` gives the gain's entry at each position, where it is not the position's own number.
    """

    gain: str
    power: int
    entries: Pattern = ()


@dataclass(frozen=True)
class Gain:
    """A norm's gain: its weight plus an offset. Not folded: something else than linear readers sees it."""

    offset: float = 0.0
    folded: bool = True


@dataclass(frozen=True)
class Point:
    """Where an axis meets the stream: the n-th point of its layer, reading there or writing behind it."""

    writes: bool
    number: int


@dataclass(frozen=True)
class Axis:
    """One axis of a parameter, or of a stack: dims (0, 1) is axis 1 of every slice along axis 0.

    Each label covers all positions: the first says what is mixed or permuted; others carry scales and swaps.
    """

    parameter: str
    dims: tuple[int, ...]
    labels: tuple[Pattern, ...]
    folds: tuple[Fold, ...] = ()
    gain: Gain | None = None
    points: tuple[Point, ...] = ()

    @property
    def key(self) -> tuple[str, tuple[int, ...]]:
        return self.parameter, self.dims


@dataclass(frozen=True)
class Part:
    """What holds outside of the layers, or in each of some layers alike (names then follow ``prefix`` and number)."""

    prefix: str = ""
    layers: tuple[int, ...] = ()
    spaces: tuple[Space, ...] = ()
    axes: tuple[Axis, ...] = ()
    rigid: tuple[str, ...] = ()  # parameters without an axis that anything changes
    unseen: tuple[
        str, ...
    ] = ()  # parameters that the traced tokens did not reach: nothing is known of them

    def stems(self) -> list[str]:
        """What its parameters' names begin with, a layer each."""
        return [f"{self.prefix}{layer}." for layer in self.layers] or [""]


@dataclass(frozen=True)
class Description:
    """A derived layout. ``whole`` is what lies outside of the layers."""

    what: str
    whole: Part
    layers: tuple[Part, ...] = ()
    _flat: Flat | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def parts(self) -> tuple[Part, ...]:
        return (self.whole, *self.layers)

    def flat(self) -> Flat:
        """Every layer written out, once."""
        if self._flat is None:
            object.__setattr__(self, "_flat", flatten(self))
        assert self._flat is not None
        return self._flat


@dataclass(frozen=True)
class FlatAxis:
    """An axis of one real parameter; ``stem`` is its layer's, which resolves the names within."""

    axis: Axis
    stem: str
    at: str  # what stands for @ in the names of spaces

    @property
    def parameter(self) -> str:
        return self.stem + self.axis.parameter

    def space(self, symbol: Symbol) -> str:
        """The full name of a symbol's space."""
        return symbol.space + self.at if symbol.space.endswith("@") else symbol.space

    def gain(self, fold: Fold) -> str:
        """The full name of a fold's gain: from / on it is the whole model's."""
        return fold.gain[1:] if fold.gain.startswith("/") else self.stem + fold.gain


@dataclass(frozen=True)
class Flat:
    """A description with every layer written out: spaces by full name (``ch@7``), axes by parameter and dims."""

    spaces: dict[str, Space]
    axes: dict[tuple[str, tuple[int, ...]], FlatAxis]
    of: dict[str, list[FlatAxis]]  # the axes of each parameter
    gains: dict[str, Gain]
    rigid: tuple[str, ...]
    unseen: tuple[str, ...]

    def parameters(self) -> set[str]:
        return {n for n, _ in self.axes} | set(self.rigid) | set(self.unseen)

    def carrying(self, space: str) -> Iterator[FlatAxis]:
        """The axes on which a space lies."""
        for a in self.axes.values():
            if any(a.space(s) == space for label in a.axis.labels for s in symbols(label)):
                yield a


def flatten(description: Description) -> Flat:
    spaces, axes = dict[str, Space](), dict[tuple[str, tuple[int, ...]], FlatAxis]()
    gains, rigid, unseen = dict[str, Gain](), list[str](), list[str]()
    several = len({p.prefix for p in description.layers}) > 1
    for part in description.parts:
        for layer, stem in zip(part.layers or (None,), part.stems(), strict=True):
            at = "" if layer is None else stem.removesuffix(".") if several else str(layer)
            for s in part.spaces:
                spaces[s.name + at if s.local else s.name] = s
            for a in part.axes:
                axes[stem + a.parameter, a.dims] = FlatAxis(a, stem, at)
                if a.gain is not None:
                    gains[stem + a.parameter] = a.gain
            rigid += [stem + n for n in part.rigid]
            unseen += [stem + n for n in part.unseen]
    of = dict[str, list[FlatAxis]]()
    for (name, _), found in axes.items():
        of.setdefault(name, []).append(found)
    return Flat(spaces, axes, of, gains, tuple(rigid), tuple(unseen))
