"""What a run says of itself: its report, before and after all is measured."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from ..compress.calibration import timed
from ..compress.derived.plan import DerivedPlan
from ..compress.plan import Plan
from ..compress.sliced import Sliced
from ..core.files import write_json, write_text
from ..core.progress import Progress
from ..io.clients import misread
from ..io.data import Tokens
from ..io.memo import Memo
from ..measure.bench import tokens_per_second
from ..measure.evaluate import Evaluation, Models, Samples, measure, unasked
from ..measure.sourced import Model, Sourced, whole
from ..model.families import positions
from ..recipe.recipe import Recipe
from .nested_report import costs

PACKAGES = ("invariance", "torch", "transformers", "safetensors", "numpy", "scipy")


@dataclass
class Data:
    """The tokens that a recipe speaks of, read before anything is computed."""

    calibration: Tokens | None
    evaluations: tuple[Evaluation, ...]
    training: Tokens | None = None


def stored_dtype(config: PretrainedConfig) -> torch.dtype | None:
    """What a checkpoint's numbers are stored in, if its config says so and they are floating-point."""
    return (
        config.dtype
        if isinstance(config.dtype, torch.dtype) and config.dtype.is_floating_point
        else None
    )


@dataclass(frozen=True)
class Made:
    """The checkpoint that came about: its config, why it is no stock one, what it stores, how many numbers, and how many of
    them in shortcuts."""

    config: PretrainedConfig
    stock: bool
    why: str
    stored: torch.dtype
    parameters: int
    shortcuts: int


def document(chart: Plan | DerivedPlan, sliced: Sliced, made: Made, data: Data) -> dict[str, Any]:
    """The report of a run, before anything is measured."""
    recipe, layout, widths, stored = chart.recipe, chart.layout, sliced.widths, made.stored
    dense, after = chart.dense.parameters({}), chart.parameters(widths, stock=made.stock)
    after = replace(after, shortcuts=made.shortcuts)  # fewer than planned where bases turn out one
    assert after.total == made.parameters
    return {
        "version": version("invariance"),
        "model": {
            "name": recipe.model,
            "family": chart.config.model_type,
            "exported_as": made.config.model_type,
            "stock": made.stock,
            "dtype": str(made.stored).removeprefix("torch."),
            "why_not_stock": made.why or None,
            "misread": misread(made.config) if made.stock else [],
            "origin": None,
            "licence": None,
        },
        "output": None,
        "recipe": recipe.to_dict(),
        "parameters": {"dense": dense.to_dict(), "sliced": after.to_dict()},
        "flops_per_token": {"dense": chart.dense.flops({}), "sliced": chart.flops(widths)},
        "kv_bytes_per_token": {
            "dense": _bytes(stored, chart.dense.kv_entries({})),
            "sliced": _bytes(stored, layout.kv_entries(widths)),
        },
        "predicted_seconds": {"dense": chart.seconds({}), "sliced": chart.seconds(widths)},
        "perplexity": {},
        "divergence": {},
        "texts": {},
        "data": {
            use: [origin.to_dict() for origin in read.origins] if read else []
            for use, read in (("calibration", data.calibration), ("training", data.training))
        },
        "tasks": [],
        "predicted": {
            "loss": sliced.foretold.loss,
            "by": sliced.foretold.by,
            "measured": None,
            "energy": sliced.energy,
        },
        "search": sliced.search,
        "nested": costs(recipe, chart, sliced, made.stored) if isinstance(chart, Plan) else None,
        "member": None,
        "recover": None,
        "quantize": None,
        "exactness": sliced.certificate.to_dict(),
        "widths": {name: widths.get(name, s.dim) for name, s in layout.spaces.items()},
        "dims": {name: s.dim for name, s in layout.spaces.items()},
        "kinds": {name: s.kind for name, s in layout.spaces.items()},
        "tokens_per_second": {"dense": None, "sliced": None},
        "samples": [],
        "seconds": {},
        "peak_memory_bytes": 0,
        "versions": {"python": platform.python_version(), **{p: version(p) for p in PACKAGES}},
    }


def _bytes(stored: torch.dtype, numbers: int | None) -> int | None:
    return None if numbers is None else stored.itemsize * numbers


def measured(
    report: dict[str, Any],
    seconds: dict[str, float],
    models: Models,
    data: Data,
    progress: Progress,
    memo: Memo,
) -> None:
    """Put what was asked for into a report: of the dense model, the sliced one, and where there is one, the recovered
    one."""
    with timed(seconds, "evaluate"):
        origins = data.calibration.origins if data.calibration else ()
        calibrated = [origin.data for origin in origins]
        report |= measure(data.evaluations, models, progress, memo, calibrated)
    for found in report["perplexity"].values():
        found.setdefault("recovered", None)
    for found in list(report["perplexity"].values())[:1]:
        report["predicted"]["measured"] = log_ratio(found["dense"], found["sliced"])


def shown(
    report: dict[str, Any],
    seconds: dict[str, float],
    models: Models,
    data: Data,
    tokenizer: Any,
    progress: Progress,
) -> None:
    """What a single run shows unasked: a text of each model, and the speed of the dense and the sliced one."""
    if tokenizer is not None and not any(isinstance(e, Samples) for e in data.evaluations):
        with timed(seconds, "evaluate"):
            text = unasked(models["dense"].config, tokenizer)
            report["samples"] = text.measure(models, progress) if text else []
    with timed(seconds, "speed"):
        report["tokens_per_second"] = speed(models["dense"], models["sliced"])


def speed(dense: Model, sliced: Model) -> dict[str, float]:
    """Tokens per second of both, in windows that the dense model takes; in turn where both are in memory."""
    length = min(256, positions(dense.config) or 256)
    if isinstance(dense, Sourced) or isinstance(sliced, Sourced):
        sides = {"dense": dense, "sliced": sliced}
        return {n: tokens_per_second({n: whole(m)}, length)[n] for n, m in sides.items()}
    return tokens_per_second({"dense": dense, "sliced": sliced}, length)


def log_ratio(dense: float, sliced: float) -> float | None:
    """By how many nats per token a perplexity is above another; None where it is no finite number."""
    return math.log(sliced / dense) if math.isfinite(sliced / dense) else None


def fill(
    folder: Path, report: dict[str, Any], spectra: Mapping[str, list[float]], recipe: Recipe
) -> None:
    """Write what lies beside a model: its card, the report and its figures, the recipe."""
    from ..report.card import card, readme
    from ..report.document import Report
    from ..report.figures import write as write_figures
    from ..report.page import figures, page
    from ..report.reading import checked

    found = checked(Report, report, "report.json")
    drawn = figures(found, spectra)
    write_text(folder / "model" / "README.md", card(found))
    write_json(folder / "report.json", report)
    write_json(folder / "spectra.json", spectra)
    write_text(folder / "report.html", page(found, spectra, drawn))
    write_figures(folder / "figures", drawn)
    write_text(folder / "recipe.yaml", recipe.to_yaml())
    write_text(folder / "README.md", readme(found, folder))
