"""What several selectors share: rounding a width."""

from __future__ import annotations

from invariance.errors import InputError
from invariance.space import Space


def rounded(width: float, space: Space, multiple_of: int) -> int:
    """The width rounded down to a multiple, at least one multiple; a whole space stays whole whatever the multiple."""
    if multiple_of > space.dim:
        raise InputError(
            f"multiple_of {multiple_of} is more than the {space.dim} directions of space '{space.name}'. "
            "Give a smaller multiple."
        )
    k = int(width + 1e-9)
    return space.dim if k >= space.dim else max(k // multiple_of, 1) * multiple_of
