"""What a recipe may write under `data`: one source, or a list of sources with shares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, Discriminator, Field, Tag

from ..core.parts import Part, Positive, Word, as_tuple

SELF = "self"  # the source that the model writes itself

# The comment that ends a field's line is its description, in messages and in the JSON Schema.


class Source(Part):
    """One source of a mixture."""

    data: Word  # a hub dataset, a local file, packaged:NAME, self, or token ids in an .npy
    share: Positive = 1.0  # how much of the windows it gives, relative to the other shares
    name: Word | None = None  # what the report calls it; null for its data
    split: Word | None = None  # which split of it; null for that of the whole

    @property
    def label(self) -> str:
        """What the report calls it."""
        return self.name or self.data


def _kind(value: Any) -> str:
    return "several" if isinstance(value, list | tuple) else "one"


Several = Annotated[tuple[Source, ...], Field(min_length=1), BeforeValidator(as_tuple)]
Data = Annotated[
    Annotated[Word, Tag("one")] | Annotated[Several, Tag("several")], Discriminator(_kind)
]


def sources(data: str | Sequence[Source]) -> tuple[Source, ...]:
    """The sources of data, one or several."""
    return (Source(data=data),) if isinstance(data, str) else tuple(data)


def named(data: str | Sequence[Source]) -> str:
    """What messages and the report call data."""
    return " + ".join(source.label for source in sources(data))


def needs_tokenizer(data: str | Sequence[Source]) -> bool:
    """Whether some of it is text that is tokenized: neither ids in a file nor text that the model writes."""
    return any(source.data != SELF and not source.data.endswith(".npy") for source in sources(data))


def are_arrays(data: str | Sequence[Source]) -> bool:
    """Whether all of it is token ids in files, which have as many windows as they have."""
    return all(source.data.endswith(".npy") for source in sources(data))
