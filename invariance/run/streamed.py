"""A run that holds one stage in memory: from where a model lies to where its checkpoint will, and what both are worth."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from ..compress.calibration import timed
from ..compress.means import Means
from ..compress.needs import SHOWN
from ..compress.pipeline import slice_model
from ..compress.plan import Plan
from ..compress.sliced import Sliced
from ..compress.writer import Writer
from ..core.cache import cache_dir
from ..core.errors import InvarianceError
from ..core.memory import trim
from ..core.outputs import MODEL, Claim
from ..core.progress import Progress
from ..io.basis_file import Basis
from ..io.memo import Memo
from ..io.models import licence, origin
from ..io.sink import Folder, open_folder
from ..io.source import open_source
from ..measure.evaluate import Models, peak_memory
from ..measure.sourced import Sourced
from ..model.source import Source
from .document import Data, Made, document, fill, measured, shown, stored_dtype


@dataclass(frozen=True)
class Equipment:
    """What a run is carried out with."""

    tokenizer: Any
    device: str
    progress: Progress


def possible(chart: Plan) -> bool:
    """Whether nothing that the plan asks for needs all of the model in memory."""
    recipe = chart.recipe
    asked = (recipe.vocabulary, recipe.recover, recipe.quantize, recipe.nested)
    return not (any(part is not None for part in asked) or chart.measures)


def run(
    chart: Plan, source: Source, data: Data, output: Claim, equipment: Equipment
) -> dict[str, Any]:
    """Slice, write and measure. Returns the report."""
    recipe, memo = chart.recipe, Memo(limit=0)
    stored = stored_dtype(source.config) or source.stored
    sink = _sink(chart, source, data, output)
    writer = Writer(sink, chart, stored)
    try:
        means = Means(cache_dir("moments"), memo, equipment.progress, writer, equipment.device)
        sliced = slice_model(source, chart, data.calibration, means)
        if writer.config is None:
            raise InvarianceError("a run ended before its checkpoint was whole")
        with timed(sliced.seconds, "export"):
            sink.finish(writer.config, source.skeleton.generation_config, equipment.tokenizer)
        why, numbers = writer.why, (writer.parameters, writer.shortcuts)
        made = Made(writer.config, why is None, why or "", stored, *numbers)
        report = document(chart, sliced, made, data)
        trim()
        _measure(report, sliced, source, str(sink.target), data, equipment)
        report["model"] |= {"origin": origin(recipe.model), "licence": licence(recipe.model)}
        report["output"] = str(output.folder)
        layout = sliced.layout
        blocks = layout.blocks(sliced.widths) if made.stock else layout.blocks({})
        spectra = {name: energy.sum(0).tolist() for name, energy in sliced.spectra.items()}
        with output.writing() as folder:
            os.replace(sink.target, folder / "model")
            Basis.of(layout, sliced.encodes).write(folder, blocks)
            fill(folder, report, spectra, recipe)
    except (
        BaseException
    ):  # a run that is killed is taken up again, one that fails or is stopped is not
        sink.lock.release()
        shutil.rmtree(sink.place, ignore_errors=True)
        raise
    return report


def _sink(chart: Plan, source: Source, data: Data, output: Claim) -> Folder:
    """Where the checkpoint comes about, beside the output; what it depends on is its key."""
    tokens = None if data.calibration is None else data.calibration.digest()
    identity = [chart.recipe.to_dict(), source.digest(), tokens, version("invariance")]
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    target = output.place / MODEL
    shutil.rmtree(target, ignore_errors=True)  # of a run that was killed before it was in its place
    return open_folder(target, key)


def _measure(
    report: dict[str, Any],
    sliced: Sliced,
    source: Source,
    made: str,
    data: Data,
    equipment: Equipment,
) -> None:
    models: Models = {
        "dense": Sourced(source, equipment.device),
        "sliced": Sourced(open_source(made), equipment.device),
    }
    measured(report, sliced.seconds, models, data, equipment.progress, Memo(limit=0))
    if source.nbytes <= SHOWN:
        shown(report, sliced.seconds, models, data, equipment.tokenizer, equipment.progress)
    report["seconds"] = {step: round(s, 3) for step, s in sliced.seconds.items()}
    report["peak_memory_bytes"] = peak_memory()
