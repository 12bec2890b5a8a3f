"""A block: coordinates that may be changed among themselves, by one element of a group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

Axis = tuple[str, int]  # a weight's name and the number of an axis


class Kind(StrEnum):
    """The group of a block."""

    GL = "GL"  # any invertible matrix; duals get the inverse transpose
    O = "O"  # orthogonal matrices
    O1 = "O1"  # orthogonal matrices that leave the vector of ones alone
    C = "C"  # a pair that rotary positions turn: complex scales
    PERM = "PERM"  # permutations; signs and scales where the equations leave them
    NODES = "NODES"  # whole heads or experts change places, with all that lies below them


@dataclass(frozen=True, eq=False)
class Block:
    """classes: class roots, in the order of the first axis that carries them; for NODES, the nodes' ids.

    where: the axes that carry the coordinates. maps: for NODES, one swap each, id to id (both ways).
    layer: the number of the only layer that carries it, if there is one.
    """

    kind: Kind
    classes: tuple[int, ...]
    where: frozenset[Axis]
    stem: str
    layer: int | None = None
    maps: tuple[Mapping[int, int], ...] = ()

    @property
    def name(self) -> str:
        return self.stem if self.layer is None else f"{self.stem}.{self.layer}"
