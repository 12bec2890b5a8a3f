"""What `invariance run` does: a recipe's model in, the folder of a smaller one and its report out."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..compress.derived.plan import DerivedPlan
from ..compress.needs import needs
from ..compress.plan import Plan
from ..compress.planner import plan
from ..core.errors import InputError
from ..core.outputs import Claim, check_room, claimed
from ..core.progress import Progress, quiet
from ..io.models import licence, load_config, load_model, load_tokenizer, origin
from ..io.source import open_source
from ..model.families import declared
from ..recipe.recipe import Recipe, load_recipe
from . import derived, streamed
from .document import stored_dtype
from .folder import write
from .outcome import Loaded, Outcome, outcome
from .reading import read_data


def run(
    path: Path,
    output: Path,
    overrides: list[str],
    *,
    device: str = "cpu",
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """What ``invariance run`` does. Returns the report."""
    recipe = load_recipe(path, overrides)
    with claimed(output, overwrite=overwrite, reads=[recipe.model]) as claim:
        return _run(recipe, claim, device, trust_remote_code, progress)


def _run(
    recipe: Recipe, output: Claim, device: str, trust_remote_code: bool, progress: Progress
) -> dict[str, Any]:
    """The run itself, its output folder claimed."""
    try:
        config = load_config(recipe.model, trust_remote_code=trust_remote_code)
        known = declared(config)
        chart = (
            plan(recipe, config, device=device, progress=progress)
            if known
            else derived.chart_of(recipe, config)
        )
        check_room(output.folder, _bytes(chart, stored_dtype(config) or torch.float32))
        tokenizer = load_tokenizer(recipe.model, trust_remote_code=trust_remote_code)
    except InputError as e:
        raise InputError(_located(recipe, str(e))) from None

    @functools.cache
    def loaded() -> PreTrainedModel:
        try:
            return load_model(recipe.model, device=device, trust_remote_code=trust_remote_code)
        except InputError as e:
            raise InputError(_located(recipe, str(e))) from None

    data = read_data(recipe, config, tokenizer, model=loaded, progress=progress)
    count = 0 if data.calibration is None else data.calibration.ids.numel()
    stored = stored_dtype(config) or torch.float32
    if isinstance(chart, DerivedPlan):
        chart.needs(stored).check(recipe.where("model"))
        model = loaded()
        found = derived.finish(model, chart, data, stored, tokenizer, progress)
        made = Outcome(
            found.model, found.report, found.spectra, stored, None, [], {}, found.certificate
        )
        made.report["model"] |= {"origin": origin(recipe.model), "licence": licence(recipe.model)}
        write(output, made, recipe, tokenizer)
        return made.report
    needs(chart, count, stored).check(recipe.where("model"))
    if streamed.possible(chart):
        loaded.cache_clear()  # where the model wrote text
        equipment = streamed.Equipment(tokenizer, device, progress)
        try:
            source = open_source(recipe.model, trust_remote_code=trust_remote_code)
        except InputError as e:
            raise InputError(_located(recipe, str(e))) from None
        try:
            return streamed.run(chart, source, data, output, equipment)
        except InputError as e:
            if not str(e).startswith(f"{recipe.model}: "):
                raise
            raise InputError(
                _located(recipe, str(e))
            ) from None  # numbers are checked as they are read
    whole = Loaded(loaded(), tokenizer, stored_dtype(config))
    result = outcome(whole, recipe, data=data, progress=progress)
    result.report["model"] |= {"origin": origin(recipe.model), "licence": licence(recipe.model)}
    write(output, result, recipe, tokenizer)
    return result.report


def _bytes(chart: Plan | DerivedPlan, stored: torch.dtype) -> int:
    """How large the checkpoint will be at least, as far as it can be told before calibration."""
    widths = chart.allocate(None)
    return 0 if widths is None else stored.itemsize * chart.parameters(widths).total


def _located(recipe: Recipe, message: str) -> str:
    """A message about the model with the recipe's line before it, unless it has one."""
    where = recipe.where("model")
    return (
        message
        if message.startswith(where.rsplit(":", 1)[0]) or message.startswith("--set")
        else f"{where}: {message}"
    )
