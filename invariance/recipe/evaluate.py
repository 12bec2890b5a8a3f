"""The part of a recipe that says what is measured: perplexity, divergence, tasks, samples."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, model_validator

from ..core.parts import Count, Part, Several, Word, Words, as_tuple
from ..io.sources import Data, named
from ..io.texts import PACKAGED_TEXTS, TEXTS
from .complaints import Problem, comments
from .yaml_text import show

PROMPTS = (
    "The people of the United States",
    "Water boils at a temperature of",
    "Question: Anna has three apples and eats one of them. How many are left?\nAnswer:",
    "def factorial(n):",
)

TEXTS_SEQUENCES = 16  # windows of each of packaged:texts, by default

# The comment that ends a field's line is its description, in messages and in the JSON Schema.


class HeldOut(Part):
    """Held-out tokens in windows."""

    data: Data  # a hub dataset, a local file, packaged:NAME, self, token ids in an .npy, or a list of them
    sequences: Count | None = None  # how many windows; null for all of an .npy, 64 of text
    tokens: Several | None = (
        None  # how many tokens a window has; null for those of an .npy, 512 of text
    )
    split: Word = "test"  # which split of the data
    batch: Count = 8  # how many windows pass at a time
    name: Word | None = None  # what the report calls it; null for its data

    @property
    def label(self) -> str:
        """What the report calls it."""
        return self.name or named(self.data)

    def each(self) -> tuple[Self, ...]:
        """Itself, or of packaged:texts one for each text."""
        if self.data != TEXTS:
            return (self,)
        return tuple(
            self.model_copy(
                update={
                    "data": name,
                    "name": f"{self.name or 'texts'}: {text.label}",
                    "sequences": self.sequences or TEXTS_SEQUENCES,
                }
            )
            for name, text in PACKAGED_TEXTS.items()
        )


class Perplexity(HeldOut):
    """The perplexity on held-out tokens."""

    stride: Count | None = (
        None  # tokens from the start of a window to the next one's; null: no overlap
    )


class Divergence(HeldOut):
    """How far the sliced model's predictions are from the dense one's, token by token and by position."""


class Tasks(Part):
    """Tasks of lm-eval, zero-shot unless they say otherwise."""

    names: Words  # tasks or groups of lm-eval, groups of ours (article, long-context), .yaml files
    shots: Annotated[int, Field(ge=0)] | None = (
        None  # how many examples come first; null: what the task says
    )
    limit: Count | None = None  # how many questions of each task; null for all
    batch: Count = 8  # how many requests pass at a time
    run_code: bool = (
        False  # whether programs that the model wrote are run (humaneval), true or false
    )

    @property
    def label(self) -> str:
        """What messages call it."""
        return ", ".join(self.names)


class Samples(Part):
    """Greedy continuations of the same prompts, side by side."""

    prompts: Words = PROMPTS  # the prompts, one or a list
    tokens: Count = 40  # how many tokens are added to each

    @property
    def label(self) -> str:
        """What messages call it."""
        return "samples"


EVALUATIONS = ("perplexity", "divergence", "tasks", "samples")


class Evaluate(Part):
    """One evaluation of the dense and of the sliced model."""

    perplexity: Perplexity | None = None  # the data to measure it on, as in {data: wikitext2}
    divergence: Divergence | None = (
        None  # the data to compare predictions on, as in {data: wikitext2}
    )
    tasks: Tasks | None = None  # what lm-eval runs, as in {names: article}
    samples: Samples | None = (
        None  # what is continued, as in {prompts: [Once upon a time], tokens: 40}
    )

    @model_validator(mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        if not isinstance(value, dict) or not value.keys() <= set(EVALUATIONS):
            return value
        for key, part in value.items():
            if part is None:
                advice = comments(cls)[key]
                raise Problem(f"got {show(None)}, but it should be a mapping. Give {advice}", key)
        if len(value) != 1:
            said = " and ".join(value) or "nothing"
            raise Problem(
                f"an entry measures one thing, and this one has {said}. Give each an entry of its own"
            )
        return value

    @property
    def kind(self) -> str:
        """Which of the evaluations it is."""
        return next(kind for kind in EVALUATIONS if getattr(self, kind) is not None)

    @property
    def part(self) -> HeldOut | Tasks | Samples:
        """What is said about it."""
        return getattr(self, self.kind)


Evaluations = Annotated[tuple[Evaluate, ...], BeforeValidator(as_tuple)]
