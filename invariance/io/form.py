"""What was done to a model that no stock config holds, as its config.json says under ``invariance``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from ..core.errors import InputError
from .clients import OLDER

TYPE = "invariance"
LEFT_OUT = (
    "architectures",
    "model_type",
    "quantization_config",
    "transformers_version",
    "_name_or_path",
    TYPE,
    *OLDER,
)
AGAIN = "Copy config.json from where the checkpoint was made, or run its recipe again."
EARLIER = ("folded", "tie", "widths", "shortcuts", "biases", "pairs", "split", "nested", "ranks")
"""What an earlier version kept beside ``original``, the family's config."""


Part = TypeVar("Part", bound=BaseModel)


class Vocabulary(BaseModel):
    """How many first tokens have rows of their own, and how many directions the rows of the others share."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    common: Annotated[int, Field(ge=1, strict=True)]
    rank: Annotated[int, Field(ge=1, strict=True)]


class Form(BaseModel):
    """What a model of ours is, beyond its family's config; spaces are named as ``invariance inspect`` names them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[2] = 2
    family: str
    """The model type of the family's config."""
    dense: dict[str, Any] = Field(default_factory=dict)
    """Values of the family's config that are others now, as they were: the stream's width, where it is narrower."""
    folded: bool = False
    """Whether norms have no gains and biases any more; these are in their readers."""
    tie: Literal["keep", "untie"] = "untie"
    widths: dict[str, NonNegativeInt] = Field(default_factory=dict)
    """The widths of spaces that are narrower than the family's config says."""
    shortcuts: list[str] = Field(default_factory=list)
    """Stages that carry the stream from one basis to another."""
    ranks: dict[str, PositiveInt] = Field(default_factory=dict)
    """Points of the stream that a shortcut of low rank leads to, and the rank."""
    biases: list[str] = Field(default_factory=list)
    """Biases of linear layers that the family's have not."""
    split: list[str] = Field(default_factory=list)
    """Matrices that are two factors."""
    pairs: dict[str, PositiveInt] = Field(default_factory=dict)
    """Query/key spaces whose frequency pairs were chosen, and how many each kept; which ones is beside the weights."""
    vocabulary: Vocabulary | None = None
    """How the rows of rare tokens are stored, where those are two factors."""
    nested: dict[str, dict[str, NonNegativeInt]] = Field(default_factory=dict)
    """Narrower models in the same weights: share → widths of the spaces that it has narrower than this one."""


def read_form(values: Any, where: str) -> Form:
    """The form that a config.json holds. Raises InputError with the key that cannot be."""
    return read_part(Form, values, TYPE, where)


def read_part(part: type[Part], values: Any, key: str, where: str) -> Part:
    """What a config.json holds of ours under a key. Raises InputError with the key below it that cannot be."""
    try:
        return part.model_validate(values)
    except ValidationError as e:
        first = e.errors()[0]
        below = ".".join(map(str, (key, *first["loc"])))
        raise InputError(
            f"{where or 'config'}: config.json: {below}: {first['msg'][:1].lower()}{first['msg'][1:]}. {AGAIN}"
        ) from None


def upgraded(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A config.json of this version; one of an earlier version had the family's config under ``original``."""
    if "original" not in values:
        if not isinstance(values.get(TYPE), dict):
            raise InputError(
                f"{where or 'config'}: config.json: no '{TYPE}', which says what was done to the model. {AGAIN}"
            )
        return dict(values)
    original = dict(values["original"])
    family = original.pop("model_type", None)
    form = {"family": family} | {key: values[key] for key in EARLIER if key in values}
    kept = {key: original[key] for key in original if key not in LEFT_OUT}
    own = ("dtype", "tie_word_embeddings", "quantization_config", "transformers_version")
    if form.get("folded") and form.get("tie", "untie") == "untie":
        kept["tie_word_embeddings"] = False
    kept |= {key: values[key] for key in own if key in values}
    return {**kept, "model_type": TYPE, TYPE: form, "key_prefix": "inner."}
