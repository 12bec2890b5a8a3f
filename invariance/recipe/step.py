"""One step of a recipe: spaces, the exact basis they get, and how they are cut."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from ..core.parts import Count, Part
from ..method.interfaces import Joint, Method, Rotator, Selector, Slicer
from .budget import Constraints
from .complaints import Problem
from .named_methods import METHODS, named
from .spaces import Spaces

Rotate = Annotated[Rotator | Joint, *named("rotate")]
Select = Annotated[Selector | None, *named("select")]
Slice = Annotated[Slicer | None, *named("slice")]


class Every(Part):
    """Segments of n blocks each."""

    every: Count  # how many blocks share one basis


Segments = Annotated[
    Annotated[Literal["global", "block", "stage"], Tag("word")] | Annotated[Every, Tag("blocks")],
    Discriminator(lambda value: "blocks" if isinstance(value, dict | Every) else "word"),
]


Rank = Annotated[int, Field(ge=0)] | Literal["exact"]


class Shortcuts(Part):
    """How two bases of the stream meet, in place of whole shortcuts."""

    rank: Rank  # at most which rank they have: a number from 0, or exact

    def at_most(self, d: int) -> int:
        """The rank as a number, of a stream d wide."""
        return d if self.rank == "exact" else self.rank


class Step(Part):
    """Spaces, the exact basis they get, and how they are cut."""

    spaces: Spaces  # kinds (residual, mlp, vo, qk, heads, edge), names such as mlp.0, or globs such as mlp.*
    segments: Segments = (
        "global"  # where the stream changes basis: global, block, stage or {every: N}
    )
    shortcuts: Shortcuts | None = (
        None  # how segments meet, as in {rank: exact}; null for whole shortcuts
    )
    slice_head: bool = (
        True  # whether the residual stream is also cut before the head, true or false
    )
    rotate: Rotate = Field(default="identity", validate_default=True)  # which exact basis
    select: Select = None  # how many directions stay
    widths: Constraints | None = (
        None  # which widths are allowed, as in {multiple_of: 32, min: 0.25}
    )
    slice: Slice = None  # how the rest goes; truncate where only `select` is given

    @model_validator(mode="before")
    @classmethod
    def _truncate(cls, value: Any) -> Any:
        cut = (
            isinstance(value, dict)
            and value.get("select") is not None
            and value.get("slice") is None
        )
        return {**value, "slice": "truncate"} if cut else value

    @model_validator(mode="after")
    def _consistent(self) -> Step:
        others = [s for s in self.spaces if s != "residual" and not s.startswith("x.")]
        for key in ("segments", "shortcuts", "slice_head"):
            if others and getattr(self, key) != Step.model_fields[key].default:
                why = f"it is about the residual stream alone, and the step also has '{others[0]}'"
                raise Problem(
                    f"{why}. Remove it, or give the residual stream a step of its own", key
                )
        if self.slice is not None and self.select is None:
            raise Problem("no `select` says how much to cut. Add one, or remove `slice`", "slice")
        if self.shortcuts is not None:
            self._check_shortcuts()
        if self.select is None and self.widths is not None:
            raise Problem("no `select` chooses among them. Add one, or remove `widths`", "widths")
        return self

    def _check_shortcuts(self) -> None:
        why = ""
        if self.segments == "global":
            why = "with one basis for the whole stream there are none. Give `segments`"
        elif self.slice is None:
            why = "where nothing is cut, each basis can be turned into the next, and none are left. Add a `select`"
        elif self.slice.mixes or self.slice.offsets:
            why = (
                f"slicer '{self.slice.name}' reads what it cuts from other directions, and a low rank needs the angles "
                "between what two bases keep. Use `slice: truncate`"
            )
        if why:
            raise Problem(f"{why}, or remove `shortcuts`", "shortcuts")

    @property
    def methods(self) -> dict[str, Method]:
        """The step's methods by kind, those that it has."""
        return {kind: method for kind in METHODS if (method := getattr(self, kind)) is not None}
