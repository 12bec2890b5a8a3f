"""What all parts of a recipe have in common, and the kinds of numbers and words in them."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class Part(BaseModel):
    """No unknown keys, no value turned into another type, nothing changed afterwards."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, arbitrary_types_allowed=True
    )


def as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def one_or_several(value: Any) -> Any:
    """One item as a list of it."""
    return tuple(value) if isinstance(value, list | tuple) else (value,)


Word = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1, le=2**53)]
Several = Annotated[int, Field(ge=2, le=2**53)]
Fraction = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Words = Annotated[tuple[Word, ...], Field(min_length=1), BeforeValidator(one_or_several)]
