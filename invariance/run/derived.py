"""A run on a type that is not rewritten: its layout derived, the whole model in memory, a stock checkpoint out of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from ..compress.derived.cut import Made as Carried
from ..compress.derived.cut import carry_out
from ..compress.derived.layout import derived_spaces
from ..compress.derived.plan import DerivedPlan, derived_plan
from ..compress.sliced import Sliced
from ..core.progress import Progress
from ..io.layouts import derived_layout
from ..io.memo import Memo
from ..io.narrowed import narrowed
from ..measure.evaluate import Models, peak_memory
from ..model.copies import copy_in
from ..model.verify import Certificate
from ..recipe.recipe import Recipe
from .document import Data, Made, document, measured, shown


@dataclass(frozen=True)
class Finished:
    """The narrower model, rounded to what its checkpoint holds, and what there is to say of it."""

    model: PreTrainedModel
    report: dict[str, Any]
    spectra: dict[str, list[float]]
    certificate: Certificate


def chart_of(recipe: Recipe, config: PretrainedConfig) -> DerivedPlan:
    """The plan of a recipe on a derived layout. Raises InputError."""
    return derived_plan(recipe, config, derived_spaces(config, derived_layout(config)))


def small_model(carried: Carried, stored: torch.dtype, dense: PreTrainedModel) -> PreTrainedModel:
    """Rounded to what is stored, and to compute with in the dense one's dtype, by its way of attention."""
    small = copy_in(dense.dtype, copy_in(stored, carried.model))
    small.config._attn_implementation = dense.config._attn_implementation
    return small


def finish(
    model: PreTrainedModel,
    chart: DerivedPlan,
    data: Data,
    stored: torch.dtype,
    tokenizer: Any,
    progress: Progress,
    evaluate: bool = True,
) -> Finished:
    """Cut, measure, report."""
    carried = carry_out(model, chart, data.calibration, progress)
    small = small_model(carried, stored, model)
    if carried.why:
        small = narrowed(small, chart.recipe.where("steps"))
    numbers = sum(p.numel() for p in small.parameters())
    made = Made(small.config, not carried.why, carried.why, stored, numbers, 0)
    sliced = Sliced(
        small,
        chart.layout,  # type: ignore[arg-type]
        carried.widths,
        carried.spectra,
        carried.certificate,
        carried.seconds,
        energy=carried.energy,
    )
    report = document(chart, sliced, made, data)
    report["exactness"] |= {"cut_error": carried.error}
    if evaluate:
        models: Models = {"dense": model, "sliced": small}
        measured(report, sliced.seconds, models, data, progress, Memo(limit=0))
        shown(report, sliced.seconds, models, data, tokenizer, progress)
    report["seconds"] = {step: round(s, 3) for step, s in sliced.seconds.items()}
    report["peak_memory_bytes"] = peak_memory()
    spectra = {name: energy.sum(0).tolist() for name, energy in carried.spectra.items()}
    return Finished(small, report, spectra, carried.certificate)
