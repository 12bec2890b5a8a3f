"""How a weight's axes meet spaces, and the residual edges that stages stand on."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from ..core.kind import Kind, space_name


class Role(Enum):
    """How a weight's axis meets its space, and so what a Change does to it."""

    WRITE = "writes"  # contracted with encode
    READ = "reads"  # contracted with decode
    GATE = "gates"  # contracted with the pattern of encode, scales and signs pass it by: gates, gains of norms


@dataclass(frozen=True)
class Axis:
    """One axis of a weight: ``heads`` runs of the space's dim; with more heads than copies, neighbours share one.

    ``outer`` is the same axis as one of the space whose directions are the runs, neighbours making one direction.
    """

    space: str
    role: Role
    heads: int = 1
    outer: Axis | None = None

    @property
    def spaces(self) -> tuple[Axis, ...]:
        """The axis as one of each space that it lies in."""
        return (self,) if self.outer is None else (self, self.outer)


@dataclass(frozen=True)
class Edge:
    """The residual edge across one stage, from one point of the stream to the next; ``post`` where a norm stands behind
    the stage's branch."""

    stage: str
    source: str
    target: str
    block: int  # the number of the block that the stage lies in
    number: int  # of the stage in its block
    leaves: bool = False  # whether the block ends behind the stage
    post: bool = False

    @property
    def written(self) -> str:
        """Where the stage's branches write, by name: the next point of the stream, or in front of the norm behind them."""
        return f"y.{self.block}.{self.number}" if self.post else self.target

    @property
    def entry(self) -> str:
        """The point of the stream where the block begins."""
        return space_name(Kind.RESIDUAL, self.block, 0)
