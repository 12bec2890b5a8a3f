"""The units of a plan: the spaces of a recipe's steps, those together that share a basis, and the methods that serve them."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TypeVar

from ..core.errors import InputError
from ..method.interfaces import Method
from ..model.layout import Layout
from ..recipe.recipe import Recipe
from ..recipe.step import Step
from .demand import Unit

M = TypeVar("M", bound=Method | None)


def units_of(recipe: Recipe, layout: Layout) -> tuple[list[Unit], list[Unit]]:
    """The units that a run changes, and those of steps that only let branches go, of spaces that later steps cut where
    they stay. Raises InputError."""
    units: list[Unit] = []
    taken: dict[str, int] = {}
    for n, step in enumerate(recipe.steps):
        names = _named(recipe, n, step, layout)
        for name in names:
            if name in taken and not _lets_go(recipe.steps[taken[name]]):
                raise InputError(
                    f"{recipe.where('steps', n, 'spaces')}: space '{name}' is already changed by step {taken[name]}. "
                    "Give each space to one step; only what selectors leave that let a number of `blocks` go can be cut by a "
                    "later one."
                )
            taken[name] = n
        units += [_unit(recipe, n, layout, members) for members in segments(layout, step, names)]
    deep = {u.step for u in units if taken[u.space.name] != u.step}
    for n in sorted(deep):
        _check_depth(recipe, n)
    changed = [
        replace(u, select=None, slice=None) if u.step in deep else u
        for u in units
        if taken[u.space.name] == u.step
    ]
    return changed, [u for u in units if u.step in deep]


def _unit(recipe: Recipe, n: int, layout: Layout, members: list[str]) -> Unit:
    """The unit of spaces that share a basis in a step."""
    step, seed = recipe.steps[n], recipe.seed
    whole = not step.slice_head and members[-1] == layout.points[-1]
    space = layout.spaces[members[0]]
    select, cut = (None, None) if whole else (step.select, step.slice)
    rotate, select, cut = seeded(step.rotate, seed), seeded(select, seed), seeded(cut, seed)
    rank = None if step.shortcuts is None or whole else step.shortcuts.at_most(space.dim)
    blocks = tuple(min(layout.spaces[m].block or 0, layout.edges[-1].block) for m in members)
    return Unit(tuple(members), blocks, space, n, rotate, select, cut, rank)


def _named(recipe: Recipe, n: int, step: Step, layout: Layout) -> list[str]:
    for pattern in step.spaces:
        if not layout.select([pattern]):
            blocks = layout.spaces[layout.points[-1]].block
            raise InputError(
                f"{recipe.where('steps', n, 'spaces')}: no space of this model is called '{pattern}'. It has {blocks} "
                "blocks; `invariance inspect` lists its spaces."
            )
    return layout.select(step.spaces)


def _lets_go(step: Step) -> bool:
    """Whether a step lets branches go and does nothing else."""
    return step.select is not None and step.select.depth


def _check_depth(recipe: Recipe, n: int) -> None:
    """Raises InputError where a step that lets branches go, whose spaces a later one cuts, says more than which go."""
    step = recipe.steps[n]
    assert step.select is not None
    if step.select.needs_budget:
        raise InputError(
            f"{recipe.where('steps', n, 'select')}: a later step cuts what '{step.select.name}' leaves, so how much goes here "
            f"must be said: `{step.select.name}: {{blocks: 2}}`."
        )
    if step.rotate.name != "identity":
        raise InputError(
            f"{recipe.where('steps', n, 'rotate')}: a later step cuts what '{step.select.name}' leaves, and gives it a basis. "
            "Remove `rotate` here."
        )


def seeded(method: M, seed: int) -> M:
    """The method, with the recipe's seed where it has a field ``seed`` that is None."""
    options = fields(method) if method else ()  # type: ignore[arg-type]
    unset = any(f.name == "seed" and getattr(method, f.name) is None for f in options)
    return replace(method, seed=seed) if unset else method  # type: ignore[type-var]


def segments(layout: Layout, step: Step, names: list[str]) -> list[list[str]]:
    """The named spaces, those together that share a basis. The point before the head joins the last block's."""
    last = layout.points[-1]
    final_block = layout.edges[-1].block
    groups: dict[object, list[str]] = {}
    for name in names:
        key: object = name
        if layout.spaces[name].kind == "qk" and step.rotate.shares_basis:
            key = replace(layout.spaces[name], name="", block=None, stage=None)  # those alike
        if layout.spaces[name].kind == "residual" and step.segments != "stage":
            block = min(layout.spaces[name].block or 0, final_block)
            every = 1 if step.segments == "block" else getattr(step.segments, "every", 0)
            key = block // every if every else 0
            if name == last and not step.slice_head:
                key = name
        groups.setdefault(key, []).append(name)
    order = {p: i for i, p in enumerate(layout.points)}
    return [sorted(g, key=lambda m: order.get(m, 0)) for g in groups.values()]
