"""The tokens that a recipe names, read before anything is computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from ..core.errors import InputError
from ..core.progress import Progress, quiet
from ..io.data import Amount, Making, Tokens, load_tokens
from ..measure.evaluate import prepare_each
from ..model.families import check_positions
from ..recipe.recipe import Recipe
from .document import Data


def read_data(
    recipe: Recipe,
    config: PretrainedConfig,
    tokenizer: Any,
    evaluate: bool = True,
    model: Callable[[], PreTrainedModel] | None = None,
    progress: Progress = quiet,
) -> Data:
    """All the tokens that a recipe names; ``model`` is asked for where it writes them. Raises InputError, with the
    recipe's line."""
    making = Making(recipe.seed, model, progress)

    def read(spec: Any, *where: str | int) -> Tokens:
        return read_tokens(spec, config, tokenizer, recipe.where(*where), making)

    calibration = read(recipe.calibrate, "calibrate", "data") if recipe.calibrate else None
    _check_skip(recipe, calibration)
    evaluations = tuple(
        prepared
        for n, e in enumerate(recipe.evaluate if evaluate else ())
        for prepared in prepare_each(
            e.part, e.kind, config, tokenizer, recipe.where("evaluate", n, e.kind, "data"), making
        )
    )
    where = (
        ("recover", "train", "data") if recipe.recover and recipe.recover.train else ("recover",)
    )
    training = read(recipe.recover.text(recipe.calibrate), *where) if recipe.recover else None
    return Data(calibration, evaluations, training)


def read_tokens(
    spec: Any, config: PretrainedConfig, tokenizer: Any, where: str, making: Making
) -> Tokens:
    """The windows that a part of a recipe with ``data`` names, no longer than the model takes. Raises InputError."""
    found = load_tokens(
        spec.data,
        tokenizer,
        vocab_size=config.vocab_size,
        split=spec.split,
        amount=Amount(spec.sequences, spec.tokens),
        where=where,
        making=making,
    )
    check_positions(config, found.ids.shape[1], where)
    return found


def _check_skip(recipe: Recipe, tokens: Tokens | None) -> None:
    """Raises InputError where `calibrate.skip` leaves nothing to measure."""
    skip = recipe.calibrate.skip if recipe.calibrate else 0
    if tokens is not None and not tokens.mask[:, skip:].any():
        raise InputError(
            f"{recipe.where('calibrate', 'skip')}: skip: {skip} leaves nothing to measure of windows of {tokens.ids.shape[1]} "
            "tokens. Skip fewer, or give longer windows."
        )
