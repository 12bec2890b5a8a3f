"""The part of a recipe that says to how many bits weights are rounded, as the last step."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from ..core.parts import Part, Several
from ..method.rounding import Rounding
from .named_methods import ROUND, named

Bits = Annotated[int, Field(ge=2, le=8)]

# The comment that ends a field's line is its description, in messages and in the JSON Schema.


class Quantize(Part):
    """Weights rounded to few bits, groups of neighbours in a row sharing one scale."""

    bits: Bits = 4  # the bits of a weight in the blocks, 2 to 8
    group: Several = 32  # how many neighbours in a row share a scale, from 2
    tables: Bits | None = (
        8  # the bits of a weight in embedding and head, 2 to 8; null leaves both alone
    )
    round: Annotated[Rounding, *named(ROUND)] = Field(
        default="nearest", validate_default=True
    )  # how weights of the blocks are rounded, as in gptq

    @model_serializer(mode="wrap")
    def _written(self, plainly: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Tables that stay as they are must be said: left out, they would be rounded."""
        found: dict[str, Any] = plainly(self)
        return {**found, "tables": None} if self.tables is None else found
