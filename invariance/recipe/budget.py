"""What a recipe lets selectors choose: what may be spent after slicing, and which widths are allowed."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from ..core.parts import Count, Fraction, Part
from .complaints import Problem


class Budget(Part):
    """What may be spent after slicing, as fractions of what the dense model spends; several at once all hold."""

    parameters: Fraction | None = None  # the fraction kept of the stored parameters
    flops: Fraction | None = None  # the fraction kept of the FLOPs per token
    kv_cache: Fraction | None = None  # the fraction kept of the cache's bytes per token
    latency: Fraction | None = None  # the fraction kept of the time that 256 tokens take here

    @model_validator(mode="after")
    def _one_at_least(self) -> Budget:
        if not self.limits:
            raise Problem(
                "nothing is limited. Give `parameters`, `flops`, `kv_cache` or `latency` a fraction"
            )
        return self

    @property
    def limits(self) -> dict[str, float]:
        """Resource → fraction, those that are limited."""
        return {
            r: share for r in type(self).model_fields if (share := getattr(self, r)) is not None
        }


Size = Annotated[int, Field(ge=0)] | Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]


class Protect(Part):
    """Blocks whose spaces stay whole."""

    first: Annotated[int, Field(ge=0)] = 0  # how many blocks at the input
    last: Annotated[int, Field(ge=0)] = 0  # how many blocks at the output


class Constraints(Part):
    """Which widths a selector may choose."""

    multiple_of: Count = 1  # widths are multiples of it; protected spaces are whole
    min: Size = (
        1  # the narrowest: a number of directions, or a fraction of them; 0 lets a branch go
    )
    max: Size = 1.0  # the widest: a number of directions, or a fraction of them
    protect: Protect = Protect()  # blocks that stay whole, as in {first: 2, last: 1}
    same: bool = False  # whether all spaces of the step get one width, true or false
