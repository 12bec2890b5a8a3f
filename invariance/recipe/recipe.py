"""The recipe: what may be asked for, read from YAML so that every mistake is told with its line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PrivateAttr, model_validator

from ..calibrate.statistic import Statistic
from ..core.parts import Fraction, Part, Seed, Word, as_tuple
from ..method.interfaces import Joint, Selector
from .budget import Budget
from .calibrate import Calibrate
from .complaints import Problem, validate
from .evaluate import Evaluations
from .named_methods import ROUND
from .overrides import override
from .quantize import Quantize
from .recover import Recover
from .step import Step
from .vocabulary import Vocabulary
from .yaml_text import Located, located, parse_mapping, read_text, written

# The comment that ends a field's line is its description, in messages and in the JSON Schema.

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
    vocabulary: Vocabulary | None = (
        None  # rows of rare tokens as two factors, as in {common: 20000, rank: 288}
    )
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
        self._check_vocabulary()
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

    def _check_vocabulary(self) -> None:
        """Its factors are fitted to tokens, and what comes after them must leave them as they are."""
        if self.vocabulary is None:
            return
        if not self.calibrate:
            what = "the rows of rare tokens are fitted to what the model makes of text, and there is no data"
            raise Problem(f"{what}. Add `calibrate: {{data: ...}}`", "vocabulary")
        if self.stock:
            why = "no stock checkpoint holds its factors"
            raise Problem(f"{why}. Remove `vocabulary` or `stock`", "stock")
        if self.nested is not None:
            why = "its members share one table"
            raise Problem(f"{why}. Remove `vocabulary` or `nested`", "nested")
        if self.quantize is not None and self.quantize.tables is not None:
            why = "a table of two factors is not rounded. Set `quantize: {tables: null}`"
            raise Problem(f"{why}, or remove `vocabulary` or `quantize`", "quantize")

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
