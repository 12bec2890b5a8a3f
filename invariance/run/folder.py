"""The folder of a run: the model, its report and figures, the basis, in one step into place."""

from __future__ import annotations

import shutil
from typing import Any

from ..core.outputs import Claim
from ..io.clients import save_tokenizer
from ..io.export import cast
from ..io.models import stored_bytes
from ..recipe.recipe import Recipe
from .document import fill
from .outcome import Outcome

RECOVERED = "recover.json"  # what `invariance recover` says of its training
SLICED = "sliced.json"  # the report of the run that sliced what was trained


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
