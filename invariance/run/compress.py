"""Compression in memory: a model and a recipe in, a smaller model out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..core.progress import Progress, quiet
from ..io.models import load_model, load_tokenizer
from ..io.sources import needs_tokenizer
from ..io.ties import note_ties
from ..model.entry import check_model
from ..model.families import declared
from ..recipe.recipe import Recipe, load_recipe
from . import derived
from .outcome import Loaded, outcome
from .reading import read_data


def compress(
    model: PreTrainedModel,
    recipe: Recipe | str | Path | Mapping[str, Any],
    *,
    tokenizer: Any = None,
    progress: Progress = quiet,
) -> PreTrainedModel:
    """A smaller model, by a recipe (an object, a file, or a mapping); the model given is left as it is.

    It generates, saves with ``save_pretrained`` and loads again: under a stock config where one basis and uniform
    widths allow it, else through ``AutoModelForCausalLM`` once ``invariance`` is imported. ``tokenizer`` is needed
    where the recipe's data is text; by default the one of ``recipe.model``. The recipe's ``evaluate`` is not run.

    Raises InputError for a recipe, model or data that cannot be, CertificateError for a rotation that is not exact.
    """
    note_ties(check_model(model))
    if not declared(model.config):
        asked = as_recipe(recipe)
        chart = derived.chart_of(asked, model.config)
        if tokenizer is None and asked.calibrate and needs_tokenizer(asked.calibrate.data):
            tokenizer = load_tokenizer(asked.model)
        data = read_data(asked, model.config, tokenizer, False, lambda: model, progress)
        return derived.finish(model, chart, data, model.dtype, tokenizer, progress, False).model
    loaded = Loaded(model, tokenizer)
    return outcome(loaded, as_recipe(recipe), evaluate=False, progress=progress).model


def load(path: str, **options: Any) -> PreTrainedModel:
    """A model from disk, the hub, a GGUF file or ``packaged:``; sliced or dense. Options as ``models.load_model``."""
    return load_model(path, **options)


def as_recipe(recipe: Recipe | str | Path | Mapping[str, Any]) -> Recipe:
    if isinstance(recipe, Recipe):
        return recipe
    return Recipe.from_dict(recipe) if isinstance(recipe, Mapping) else load_recipe(recipe)
