"""The recipe: what may be asked for, read from YAML so that every mistake is told with its line."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    WithJsonSchema,
    model_validator,
)

from ..calibrate.statistic import Statistic
from ..core.errors import did_you_mean
from ..core.parts import Count, Fraction, Part, Seed, Word, as_tuple
from ..io.sources import Data
from ..method.interfaces import Joint, Method, Rotator, Selector, Slicer
from .complaints import Problem, validate
from .evaluate import Evaluations
from .named_methods import METHODS, ROUND, choices, described, named
from .overrides import override
from .quantize import Quantize
from .recover import Recover
from .yaml_text import Located, located, parse_mapping, read_text, show, written

SPACES = {
    "residual": "x",
    "mlp": "mlp",
    "vo": "vo",
    "qk": "qk",
    "heads": "heads",
    "edge": "edge",
    "experts": "experts",
}  # a kind, and how names of its spaces begin

# The comment that ends a field's line is its description, in messages and in the JSON Schema.


def _spaces(value: Any) -> tuple[str, ...]:
    """Kinds, names or glob patterns, each of them one that some model could have."""
    patterns = tuple(value) if isinstance(value, list | tuple) else (value,)
    for i, pattern in enumerate(patterns):
        at = (i,) if isinstance(value, list) else ()
        if not isinstance(pattern, str):
            raise Problem(f"got {show(pattern)}; write a space's kind, a name or a pattern", *at)
        head, _, rest = pattern.partition(".")
        if (
            pattern not in SPACES
            and not (rest and head in SPACES.values())
            and not re.search(r"[*?[]", head)
        ):
            raise Problem(f"no space is called '{pattern}'{did_you_mean(head, SPACES)}", *at)
        if pattern in patterns[:i]:
            raise Problem(f"'{pattern}' stands here twice; remove one", *at)
    return patterns


WORDS = {
    "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]
}
Spaces = Annotated[
    tuple[str, ...], Field(min_length=1), BeforeValidator(_spaces), WithJsonSchema(WORDS)
]
Rotate = Annotated[Rotator | Joint, *named("rotate")]
Select = Annotated[Selector | None, *named("select")]
Slice = Annotated[Slicer | None, *named("slice")]


class Calibrate(Part):
    """The data on which moments are measured."""

    data: Data  # a hub dataset, a local file, packaged:NAME, self, token ids in an .npy, or a list of them
    sequences: Count | None = None  # how many sequences; null for all there are
    tokens: Count | None = (
        None  # how many tokens a sequence has; null for what the data or the model has
    )
    split: Word = "train"  # which split of the data
    batch: Count = 8  # how many sequences pass at a time
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # what the forward pass computes in
    skip: Annotated[int, Field(ge=0)] = (
        0  # how many first tokens of a sequence pass the model unmeasured
    )
    fisher: Count = 8  # how many of the sequences the output's Fisher is measured on, the first


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


Shares = Annotated[tuple[Fraction, ...], Field(min_length=1), BeforeValidator(as_tuple)]
Steps = Annotated[tuple[Step, ...], Field(min_length=1), BeforeValidator(as_tuple)]
Order = Literal["oneshot", "sequential", "dense_target"]
Refit = Literal["writers", "both"]


class Recipe(Part):
    """Everything that a run is asked to do."""

    model: Word  # a hub id, a folder, a GGUF file or packaged:NAME
    calibrate: Calibrate | None = (
        None  # the data on which moments are measured, as in {data: wikitext2}
    )
    order: Order = (
        "oneshot"  # calibrate before cutting, behind earlier cuts, or towards the dense stream
    )
    refit: Refit = "both"  # in order dense_target: the stream's writers, or its readers too
    budget: Budget | None = None  # what `select` may spend over all steps, as in {parameters: 0.8}
    stock: bool = (
        False  # whether selectors keep to widths that a stock checkpoint can hold, true or false
    )
    nested: Shares | None = (
        None  # narrower models in the same weights, falling shares as in [0.8, 0.7]
    )
    tie: Literal["keep", "untie"] = "untie"  # whether tied embeddings stay tied
    seed: Seed = 0  # the seed of all that is random, a whole number from 0
    steps: Steps  # what is done to which spaces, as in [{spaces: residual, rotate: pca}]
    recover: Recover | None = None  # training after slicing, as in {lora: {rank: 16}, epochs: 1}
    quantize: Quantize | None = None  # weights rounded at the end, as in {bits: 4, group: 32}
    evaluate: Evaluations = ()  # what is measured, as in [{perplexity: {data: wikitext2}}]

    _root: Any = PrivateAttr(default=None)  # the text it was read from

    def __eq__(self, other: object) -> bool:  # wherever they were read from
        return isinstance(other, Recipe) and self.__dict__ == other.__dict__

    def where(self, *path: str | int) -> str:
        """The file and line at which a part of the recipe stands, or the nearest part above it; or the flag that set
        something in it."""
        node: Located | None = self._root
        where = node.where if node else "<recipe>"
        for key in path:
            node = node.child(key) if node else None
            where = node.where if node else where
        return (node.flag() if node else None) or where

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        for i, step in enumerate(self.steps):
            for kind, method in step.methods.items():
                at = ("steps", i, kind)
                if not self.calibrate and method.needs - {Statistic.READERS}:
                    what = f"'{method.name}' reads moments, and there is no data to measure them on"
                    raise Problem(
                        f"{what}. Add `calibrate: {{data: ...}}`, or choose another method", *at
                    )
                if not self.calibrate and isinstance(method, Selector) and method.measures:
                    what = (
                        f"'{method.name}' measures losses, and there is no data to measure them on"
                    )
                    raise Problem(
                        f"{what}. Add `calibrate: {{data: ...}}`, or choose another method", *at
                    )
                if isinstance(method, Joint):
                    self._check_joint(method, *at)
                if not self.budget and isinstance(method, Selector) and method.needs_budget:
                    raise Problem(
                        f"'{method.name}' spends a budget. Add `budget: {{parameters: ...}}`", *at
                    )
        if self.budget and not any(step.select and step.select.needs_budget for step in self.steps):
            fixed = any(step.select for step in self.steps)
            why = "each `select` fixes its widths" if fixed else "none has a `select`"
            instead = "Add one that spends it, such as `select: uniform` with no width, or remove the budget"
            raise Problem(f"no step spends it: {why}. {instead}", "budget")
        if self.quantize and self.quantize.round.reads and not self.calibrate:
            what = f"'{self.quantize.round.name}' reads moments, and there is no data to measure them on"
            raise Problem(
                f"{what}. Add `calibrate: {{data: ...}}`, or round to `nearest`", "quantize", ROUND
            )
        if self.quantize and self.nested is not None:
            why = "rounded weights cannot be cut to the narrower models that `nested` asks for"
            raise Problem(f"{why}. Remove one of the two", "quantize")
        self._check_nested()
        if self.recover and not self.recover.train and not self.calibrate:
            raise Problem(
                "there is no text to train on. Add `recover: {train: {data: ...}}`", "recover"
            )
        labels = [(e.kind, e.part.label) for e in self.evaluate]
        for i, (kind, label) in enumerate(labels):
            if (kind, label) in labels[:i]:
                instead = (
                    "Give this one a `name`"
                    if kind in ("perplexity", "divergence")
                    else "Remove one"
                )
                raise Problem(f"the report has '{label}' already. {instead}", "evaluate", i)
        return self

    def _check_joint(self, method: Joint, *at: str | int) -> None:
        """It sees the dense model and its tokens, and serves one choice of widths."""
        if not self.calibrate:
            what = f"'{method.name}' looks at what the model makes of tokens, and there are none"
            raise Problem(f"{what}. Add `calibrate: {{data: ...}}`, or take a rotator", *at)
        if self.order != "oneshot":
            what = (
                f"'{method.name}' sees the dense model, and order '{self.order}' fits behind cuts"
            )
            raise Problem(f"{what}. Use `order: oneshot`, or take a rotator", *at)
        if self.nested is not None:
            what = f"'{method.name}' serves one width, and `nested` asks for several"
            raise Problem(f"{what}. Remove `nested`, or take a rotator", *at)

    def _check_nested(self) -> None:
        """Narrower members are the first directions of one basis, cut under one budget, and nothing is refit."""
        if self.nested is None:
            if self.recover and self.recover.nested:
                why = "no members are there to train together. Add `nested: [...]` to the recipe"
                raise Problem(f"{why}, or remove it", "recover", "nested")
            return
        limits = self.budget.limits if self.budget else {}
        if len(limits) != 1:
            raise Problem(
                "its shares are of what the budget limits, which must be one resource. Add `budget: {parameters: ...}`, "
                "the share of the widest",
                "nested",
            )
        (widest,) = limits.values()
        for i, (wider, share) in enumerate(pairwise((widest, *self.nested))):
            if share >= wider:
                of = "the budget's own, that of the widest" if not i else "the one before"
                raise Problem(
                    f"{share} is not below {wider}, {of}. Give falling shares", "nested", i
                )
        if self.order != "oneshot":
            why = f"order '{self.order}' fits bases behind the cuts of one width, and the others would have other bases"
            raise Problem(f"{why}. Use `order: oneshot`, or a recipe for each width", "nested")
        for i, step in enumerate(self.steps):
            if step.slice is not None and not step.slice.prefix:
                why = f"'{step.slice.name}' refits for one width, and `nested` asks for weights that all widths share"
                raise Problem(
                    f"{why}. Use `slice: truncate`, or remove `nested`", "steps", i, "slice"
                )
            if step.shortcuts is not None:
                why = "they turn what one width keeps, and `nested` asks for bases whose first directions all widths keep"
                raise Problem(f"{why}. Remove `shortcuts`, or `nested`", "steps", i, "shortcuts")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """The inverse of ``to_dict``. Raises InputError."""
        return recipe_of(located(data, "<recipe>"))

    def to_dict(self) -> dict[str, Any]:
        """The recipe in full, defaults included, as JSON can hold it; methods as a recipe writes them."""
        return self.model_dump(mode="json", exclude_none=True)

    def to_yaml(self) -> str:
        """The recipe in full, as YAML that ``parse_recipe`` reads."""
        return written(self.to_dict())


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from a file, then apply ``key=value`` overrides. Raises InputError."""
    return parse_recipe(read_text(path), str(path), overrides)


def load_recover(path: Path | None, overrides: Sequence[str] = ()) -> Recover:
    """Read what a recipe has under ``recover`` from a file of its own, if there is one. Raises InputError."""
    root = located({}, "recover")
    if path is not None:
        root = parse_mapping(read_text(path, "recovery"), str(path), "recovery", "`train`")
    for assignment in overrides:
        override(root, assignment)
    return validate(Recover, root)


def parse_recipe(text: str, where: str = "<recipe>", overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from YAML text, then apply ``key=value`` overrides. Raises InputError."""
    root = parse_mapping(text, where, "recipe", "`model` and `steps`")
    for assignment in overrides:
        override(root, assignment)
    return recipe_of(root)


def recipe_of(root: Located) -> Recipe:
    """The recipe that a tree of values holds. Raises InputError."""
    recipe = validate(Recipe, root)
    recipe._root = root
    return recipe


def _parts(cls: type[Part]) -> list[type[Part]]:
    return [model for sub in cls.__subclasses__() for model in (sub, *_parts(sub))]


def json_schema() -> dict[str, Any]:
    """The JSON Schema of recipes, for editors, with every registered method and its options."""
    schema = described(Recipe, Recipe.model_json_schema())
    definitions = schema["$defs"]
    for model in _parts(Part):
        if model.__name__ in definitions:
            described(model, definitions[model.__name__])
    for kind in METHODS:
        definitions["Step"]["properties"][kind]["anyOf"], more = choices(kind)
        definitions |= more
    definitions["Quantize"]["properties"][ROUND]["anyOf"], more = choices(ROUND)
    definitions |= more
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
