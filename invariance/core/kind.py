"""Kinds of spaces, and what spaces are called."""

from __future__ import annotations

from enum import StrEnum


class Kind(StrEnum):
    """Where in a block a space lies."""

    RESIDUAL = "residual"  # a point of the stream
    MLP = "mlp"  # channels
    VO = "vo"  # what a head's values and output projection share
    QK = "qk"  # what a head's queries and keys share
    HEADS = "heads"  # KV groups
    EDGE = "edge"  # between the two factors of a matrix
    EXPERTS = "experts"  # whole ones, behind a router


def space_name(kind: Kind, block: int, stage: int | None = None, part: str | None = None) -> str:
    """``x.3.1``: the stream before stage 1 of block 3; ``mlp.3``: inside block 3; ``edge.3.down``: inside a matrix."""
    if kind == Kind.RESIDUAL:
        return f"x.{block}.{stage}"
    return f"{kind}.{block}" if part is None else f"{kind}.{block}.{part}"


KINDS = tuple(
    kind for kind in Kind if kind not in (Kind.EDGE, Kind.EXPERTS)
)  # that every declared family has
