"""What comes of a model and a recipe: slice, recover, export, quantise, measure, step by step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from ..compress.calibration import timed
from ..compress.means import Means
from ..compress.nested import Members
from ..compress.pipeline import slice_model
from ..compress.plan import Plan
from ..compress.planner import plan
from ..compress.sliced import Sliced
from ..compress.vocabulary import factor_vocabulary
from ..core.cache import cache_dir
from ..core.change import Basis as SpaceBasis
from ..core.errors import InputError
from ..core.progress import Progress, quiet
from ..io.basis_file import Basis
from ..io.checkpoint import InvarianceForCausalLM, wrap
from ..io.export import cast, stock
from ..io.memo import Memo
from ..io.models import load_tokenizer, weights_digest
from ..io.rounded import check_installed
from ..io.source import live
from ..io.sources import needs_tokenizer
from ..measure.evaluate import peak_memory
from ..model.copies import copy_in
from ..model.verify import Certificate
from ..recipe.recipe import Recipe
from .document import Data, Made, document, measured, shown
from .nested_report import measure_members, members_of
from .quantize_run import quantize_both
from .reading import read_data

if TYPE_CHECKING:  # it imports Lightning
    from ..recover.recover import Recovered


@dataclass(frozen=True)
class Loaded:
    """A model as it comes: its tokenizer, what its checkpoint stores, and what earlier runs on it have computed."""

    model: PreTrainedModel
    tokenizer: Any = None  # None: that of the recipe's model, where its data is text
    stored: torch.dtype | None = None  # the checkpoint's dtype; None for the model's own
    memo: Memo = field(default_factory=Memo)


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


@dataclass(frozen=True)
class _Cut:
    """A model that is cut and not exported yet, and what it came from."""

    dense: PreTrainedModel
    stored: torch.dtype
    chart: Plan
    sliced: Sliced
    basis: Basis  # of the residual stream
    shared: Members


def outcome(
    model: PreTrainedModel | Loaded,
    recipe: Recipe,
    *,
    evaluate: bool = True,
    data: Data | None = None,
    progress: Progress = quiet,
    extras: bool = True,
    early: Callable[[PreTrainedModel], None] | None = None,
) -> Outcome:
    """Slice, export and, if asked, measure a model by a recipe.

    ``data`` are the recipe's tokens, if they are read already. ``extras`` are the speed and a sampled text, which no
    recipe asks for. ``early`` sees the finished model before it is measured, and may raise.
    """
    loaded = model if isinstance(model, Loaded) else Loaded(model)
    dense, memo, tokenizer = loaded.model, loaded.memo, loaded.tokenizer
    chart = plan(recipe, dense.config, device=dense.device, progress=progress)
    if tokenizer is None and recipe.calibrate and needs_tokenizer(recipe.calibrate.data):
        tokenizer = load_tokenizer(recipe.model)
    data = data or read_data(recipe, dense.config, tokenizer, evaluate, lambda: dense, progress)
    _check(recipe, data, dense)
    means = Means(cache_dir("moments"), memo, progress)
    sliced = slice_model(dense, chart, data.calibration, means)
    seconds = sliced.seconds
    _factor(sliced, chart, data, progress)
    basis, shared = Basis.of(sliced.layout, sliced.encodes), members_of(sliced, recipe)
    made = _Cut(dense, loaded.stored or dense.dtype, chart, sliced, basis, shared)
    before = _exported_copy(made) if recipe.recover is not None and evaluate else None
    recovered = None if recipe.recover is None else _recover(made, data, memo, progress)
    with timed(seconds, "export"):
        small, why = _exported(made)
    report = _report(made, small, why, data, recovered)
    if early is not None:
        early(small)
    models = {"dense": dense, "sliced": small if before is None else before}
    models |= {} if before is None else {"recovered": small}
    models |= _quantized(made, small, report, data, evaluate, progress)
    if evaluate:
        measured(report, seconds, models, data, progress, memo)
        if isinstance(small, InvarianceForCausalLM) and shared:
            with timed(seconds, "evaluate"):
                measure_members(report, small, dense, made.stored, data.evaluations, progress, memo)
        if extras:
            shown(report, seconds, models, data, tokenizer, progress)
    report["seconds"] = {step: round(s, 3) for step, s in seconds.items()}
    report["peak_memory_bytes"] = peak_memory()
    return Outcome(
        models.get("quantized", small),
        report,
        {name: energy.sum(0).tolist() for name, energy in sliced.spectra.items()},
        made.stored,
        basis,
        sliced.layout.blocks(sliced.widths if report["model"]["stock"] else {}),
        sliced.bases,
        sliced.certificate,
        recovered.logs if recovered is not None else None,
    )


def _factor(sliced: Sliced, chart: Plan, data: Data, progress: Progress) -> None:
    """Make two factors of the rows of rare tokens, where that is asked for."""
    if chart.shape is None:
        return
    assert data.calibration is not None
    arch, tokens = sliced.layout.architecture, data.calibration
    with timed(sliced.seconds, "vocabulary"):
        lost = factor_vocabulary(sliced.model, arch, chart.shape, tokens, progress)
    sliced.energy["vocabulary"] = lost


def _check(recipe: Recipe, data: Data, dense: PreTrainedModel) -> None:
    """Raises InputError where what comes after slicing cannot be."""
    if recipe.recover is not None:
        from ..recover.recover import check  # which imports Lightning

        assert data.training is not None
        check(recipe.recover, data.training, dense.device, recipe.where("recover"))
    if recipe.quantize is not None:
        check_installed(recipe.where("quantize"))


def _recover(cut: _Cut, data: Data, memo: Memo, progress: Progress) -> Recovered:
    """Train what slicing left, in place."""
    from ..recover.recover import recover
    from ..recover.training import Restructured, Training

    recipe, model = cut.chart.recipe, cut.sliced.model
    assert recipe.recover is not None and data.training is not None
    with timed(cut.sliced.seconds, "recover"):
        return recover(
            Restructured(model, cut.basis, cut.shared),
            cut.dense,
            data.training,
            Training(recipe.recover, recipe.seed, recipe.where("recover")),
            identity={
                "student": weights_digest(model),
                "dense": memo.weights(live(cut.dense)),
            },
            progress=progress,
        )


def _exported_copy(cut: _Cut) -> PreTrainedModel:
    """The checkpoint of a model that is trained further."""
    with timed(cut.sliced.seconds, "export"):
        model = cut.sliced.model
        kept = replace(cut.sliced, model=copy_in(model.dtype, model))
        return _exported(replace(cut, sliced=kept))[0]


def _exported(cut: _Cut) -> tuple[PreTrainedModel, str]:
    """A sliced model as its checkpoint has it, to compute with in the dense one's dtype, and why it is no stock one."""
    sliced, dense, recipe = cut.sliced, cut.dense, cut.chart.recipe
    made, why = (
        None,
        f"it holds {len(cut.shared)} nested models, which `invariance extract` makes checkpoints of",
    )
    if cut.chart.shape is not None:
        why = cut.chart.why_not_stock(sliced.widths) or ""
    elif not cut.shared:
        made, why = stock(sliced.model, sliced.layout, cut.chart.dense, dense.config)
        if made is None and recipe.stock:
            raise InputError(
                f"{recipe.where('stock')}: no stock checkpoint holds this model: {why}. Change that, or remove `stock`."
            )
    small = (
        made
        if made is not None
        else wrap(sliced.model, sliced.layout, dense.config, recipe.tie, cut.shared)
    )
    cast(small, cut.stored)
    cast(small, dense.dtype)
    return small, why


def _quantized(
    cut: _Cut,
    small: PreTrainedModel,
    report: dict[str, Any],
    data: Data,
    evaluate: bool,
    progress: Progress,
) -> Mapping[str, PreTrainedModel]:
    """The cut model with rounded weights, and what it is compared with; none where the recipe rounds nothing."""
    asked = cut.chart.recipe.quantize
    if asked is None:
        return {}
    with timed(cut.sliced.seconds, "quantize"):
        rounded = quantize_both(
            cut.dense, small, asked, cut.stored, data.calibration, evaluate, progress
        )
    report["quantize"] = rounded.report
    report["versions"]["torchao"] = version("torchao")
    return rounded.models


def _report(
    cut: _Cut, small: PreTrainedModel, why: str, data: Data, recovered: Recovered | None
) -> dict[str, Any]:
    """The report before anything is measured."""
    numbers = sum(p.numel() for p in small.parameters())
    met = sum(p.numel() for n, p in small.named_parameters() if n.endswith(".shortcut"))
    is_stock = not isinstance(small, InvarianceForCausalLM)
    kind = Made(small.config, is_stock, why, cut.stored, numbers, met)
    report = document(cut.chart, cut.sliced, kind, data)
    if recovered is not None:
        report["recover"] = recovered.report
        report["versions"] |= {p: version(p) for p in ("lightning", "peft")}
    return report
