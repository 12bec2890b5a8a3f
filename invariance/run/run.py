"""A whole run: a model and a recipe in, a smaller model and a report out, and the folder that both are written to."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from ..compress.calibration import timed
from ..compress.derived.plan import DerivedPlan
from ..compress.means import Means
from ..compress.needs import needs
from ..compress.nested import Members
from ..compress.pipeline import slice_model
from ..compress.plan import Plan
from ..compress.planner import plan
from ..compress.sliced import Sliced
from ..core.cache import cache_dir
from ..core.change import Basis as SpaceBasis
from ..core.errors import InputError
from ..core.outputs import Claim, check_room, claimed
from ..core.progress import Progress, quiet
from ..io.basis_file import Basis
from ..io.checkpoint import InvarianceForCausalLM, wrap
from ..io.clients import save_tokenizer
from ..io.data import Making, Tokens, load_tokens
from ..io.export import cast, stock
from ..io.layouts import declared
from ..io.memo import Memo
from ..io.models import (
    licence,
    load_config,
    load_model,
    load_tokenizer,
    origin,
    stored_bytes,
    weights_digest,
)
from ..io.rounded import check_installed
from ..io.source import live, open_source
from ..io.sources import needs_tokenizer
from ..io.ties import note_ties
from ..measure.evaluate import peak_memory, prepare_each
from ..model.entry import check_model
from ..model.families import check_positions
from ..model.verify import Certificate, copy_in
from ..recipe.recipe import Recipe, load_recipe
from . import derived, streamed
from .document import Data, Made, document, fill, measured, shown, stored_dtype
from .nested_report import measure_members, members_of
from .quantize_run import quantize_both

RECOVERED = "recover.json"  # what `invariance recover` says of its training
SLICED = "sliced.json"  # the report of the run that sliced what was trained


@dataclass
class Outcome:
    """The sliced model, ready to generate and save, and all that is known of how it came about."""

    model: PreTrainedModel
    report: dict[str, Any]
    spectra: dict[str, list[float]]
    stored: torch.dtype  # what the checkpoint holds; the model's numbers are rounded to it already
    basis: Basis | None  # of its residual stream; None where the layout is derived
    blocks: list[int]  # those that the checkpoint has, of the dense model's
    bases: Mapping[str, SpaceBasis]  # of every space that a step names
    certificate: Certificate
    logs: Path | None = None  # the curves of recovery


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
    return outcome(
        model,
        as_recipe(recipe),
        tokenizer=tokenizer,
        evaluate=False,
        progress=progress,
    ).model


def load(path: str, **options: Any) -> PreTrainedModel:
    """A model from disk, the hub, a GGUF file or ``packaged:``; sliced or dense. Options as ``models.load_model``."""
    return load_model(path, **options)


def as_recipe(recipe: Recipe | str | Path | Mapping[str, Any]) -> Recipe:
    if isinstance(recipe, Recipe):
        return recipe
    return Recipe.from_dict(recipe) if isinstance(recipe, Mapping) else load_recipe(recipe)


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
        sequences=spec.sequences,
        tokens=spec.tokens,
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


def outcome(
    model: PreTrainedModel,
    recipe: Recipe,
    *,
    tokenizer: Any = None,
    evaluate: bool = True,
    data: Data | None = None,
    stored: torch.dtype | None = None,
    progress: Progress = quiet,
    memo: Memo | None = None,
    extras: bool = True,
    early: Callable[[PreTrainedModel], None] | None = None,
) -> Outcome:
    """Slice, export and, if asked, measure a model by a recipe.

    ``stored`` is the dtype of the checkpoint that the model came from, by default the model's own. ``memo`` remembers
    what the runs on one model have in common; ``extras`` are the speed and a sampled text, which no recipe asks for.
    ``early`` sees the finished model before it is measured, and may raise.
    """
    memo = memo or Memo()
    chart = plan(recipe, model.config, device=model.device, progress=progress)
    if tokenizer is None and recipe.calibrate and needs_tokenizer(recipe.calibrate.data):
        tokenizer = load_tokenizer(recipe.model)
    data = data or read_data(recipe, model.config, tokenizer, evaluate, lambda: model, progress)
    if recipe.recover is not None:
        from ..recover.recover import check, recover  # which imports Lightning

        assert data.training is not None
        check(recipe.recover, data.training, model.device, recipe.where("recover"))
    if recipe.quantize is not None:
        check_installed(recipe.where("quantize"))
    means = Means(cache_dir("moments"), memo, progress)
    sliced = slice_model(model, chart, data.calibration, means)
    stored = stored or model.dtype
    basis = Basis.of(sliced.layout, sliced.encodes)
    before, recovered = None, None
    shared = members_of(sliced, recipe)
    if recipe.recover is not None:
        assert data.training is not None
        if evaluate:
            with timed(sliced.seconds, "export"):
                kept = replace(sliced, model=copy_in(sliced.model.dtype, sliced.model))
                before, _ = _exported(kept, chart, recipe, model, stored, shared)
        with timed(sliced.seconds, "recover"):
            recovered = recover(
                sliced.model,
                basis,
                model,
                data.training,
                recipe.recover,
                seed=recipe.seed,
                identity={
                    "student": weights_digest(sliced.model),
                    "dense": memo.weights(live(model)),
                },
                where=recipe.where("recover"),
                nested=shared,
                progress=progress,
            )
    with timed(sliced.seconds, "export"):
        small, why = _exported(sliced, chart, recipe, model, stored, shared)
    numbers = sum(p.numel() for p in small.parameters())
    is_stock = not isinstance(small, InvarianceForCausalLM)
    met = sum(p.numel() for n, p in small.named_parameters() if n.endswith(".shortcut"))
    kind = Made(small.config.model_type, is_stock, why, stored, numbers, met)
    report = document(chart, sliced, kind, data)
    if recovered is not None:
        report["recover"] = recovered.report
        report["versions"] |= {p: version(p) for p in ("lightning", "peft")}
    if early is not None:
        early(small)
    models = {"dense": model, "sliced": small if before is None else before}
    models |= {} if before is None else {"recovered": small}
    made = small
    if recipe.quantize is not None:
        with timed(sliced.seconds, "quantize"):
            found = quantize_both(
                model,
                small,
                recipe.quantize,
                stored,
                data.calibration,
                evaluate,
                progress,
            )
        models |= found.models
        made, report["quantize"] = found.models["quantized"], found.report
        report["versions"]["torchao"] = version("torchao")
    if evaluate:
        measured(report, sliced.seconds, models, data, progress, memo)
        if isinstance(small, InvarianceForCausalLM) and shared:
            with timed(sliced.seconds, "evaluate"):
                measure_members(report, small, model, stored, data.evaluations, progress, memo)
        if extras:
            shown(report, sliced.seconds, models, data, tokenizer, progress)
    report["seconds"] = {step: round(s, 3) for step, s in sliced.seconds.items()}
    report["peak_memory_bytes"] = peak_memory()
    spectra = {name: energy.sum(0).tolist() for name, energy in sliced.spectra.items()}
    blocks = (
        sliced.layout.blocks(sliced.widths)
        if report["model"]["stock"]
        else sliced.layout.blocks({})
    )
    logs = recovered.logs if recovered is not None else None
    return Outcome(
        made, report, spectra, stored, basis, blocks, sliced.bases, sliced.certificate, logs
    )


def _exported(
    sliced: Sliced,
    chart: Plan,
    recipe: Recipe,
    dense: PreTrainedModel,
    stored: torch.dtype,
    shared: Members,
) -> tuple[PreTrainedModel, str]:
    """A sliced model as its checkpoint has it, to compute with in the dense one's dtype, and why it is no stock one."""
    made, why = (
        None,
        f"it holds {len(shared)} nested models, which `invariance extract` makes checkpoints of",
    )
    if not shared:
        made, why = stock(sliced.model, sliced.layout, chart.dense, dense.config)
        if made is None and recipe.stock:
            raise InputError(
                f"{recipe.where('stock')}: no stock checkpoint holds this model: {why}. Change that, or remove `stock`."
            )
    small = (
        made
        if made is not None
        else wrap(sliced.model, sliced.layout, dense.config, recipe.tie, shared)
    )
    cast(small, stored)
    cast(small, dense.dtype)
    return small, why


def write(output: Claim, result: Outcome, recipe: Recipe, tokenizer: Any) -> None:
    """The whole folder, under a temporary name and then in one step into place."""
    result.report["output"] = str(output.folder)
    with output.writing() as folder:
        cast(result.model, result.stored)
        result.model.save_pretrained(folder / "model")
        if tokenizer is not None:
            save_tokenizer(tokenizer, folder / "model")
        if result.report["quantize"] is not None:
            result.report["quantize"]["file_bytes"] = stored_bytes(str(folder / "model"))
        if result.basis is not None:
            result.basis.write(folder, result.blocks)
        if result.logs is not None:
            shutil.copytree(result.logs, folder / "recover")
        fill(folder, result.report, result.spectra, recipe)
    if result.logs is not None:
        shutil.rmtree(result.logs.parent, ignore_errors=True)  # what was kept to resume from


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
        setting = streamed.Setting(tokenizer, device, trust_remote_code, progress)
        try:
            source = open_source(recipe.model, trust_remote_code=trust_remote_code)
        except InputError as e:
            raise InputError(_located(recipe, str(e))) from None
        try:
            return streamed.run(chart, source, data, output, setting)
        except InputError as e:
            if not str(e).startswith(f"{recipe.model}: "):
                raise
            raise InputError(
                _located(recipe, str(e))
            ) from None  # numbers are checked as they are read
    model = loaded()
    result = outcome(
        model,
        recipe,
        tokenizer=tokenizer,
        data=data,
        stored=stored_dtype(config),
        progress=progress,
    )
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
