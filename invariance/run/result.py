"""All that slicing a model in memory gives: the model, its report, spectra, bases and certificate, and the folder of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxtyping import Float64
from torch import Tensor
from transformers import PreTrainedModel

from ..core.change import Basis
from ..core.outputs import claimed
from ..core.progress import Progress, quiet
from ..io.ties import note_ties
from ..model.entry import check_model
from ..model.verify import Certificate
from ..recipe.recipe import Recipe
from .compress import as_recipe
from .folder import write
from .outcome import Loaded, Outcome, outcome


@dataclass(frozen=True, eq=False)
class Result:
    """A sliced model, ready to generate and to save, and all that is known of how it came about.

    ``report`` is what report.json holds. ``bases`` and ``spectra`` are of every space that a step names: its basis, and what is
    lost with each direction, of shape (copies, dim), in the rotator's units. ``certificate`` says that the bases alone
    left the logits.
    """

    model: PreTrainedModel
    report: dict[str, Any]
    bases: Mapping[str, Basis]
    certificate: Certificate
    recipe: Recipe
    _outcome: Outcome = field(repr=False)
    _tokenizer: Any = field(repr=False)

    @property
    def spectra(self) -> dict[str, Float64[Tensor, "c d"]]:
        """Space → its energies."""
        return {name: basis.energy for name, basis in self.bases.items()}

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write the folder that ``invariance run`` writes: model, card, report, figures, recipe. Returns it.

        Raises InputError, with nothing written, where the folder is taken or cannot be.
        """
        kept = self.model.dtype
        with claimed(Path(folder), overwrite=overwrite, flag="folder") as claim:
            write(claim, self._outcome, self.recipe, self._tokenizer)
        self.model.to(dtype=kept)  # type: ignore[call-arg]
        return claim.folder


def compression(
    model: PreTrainedModel,
    recipe: Recipe | str | Path | Mapping[str, Any],
    *,
    tokenizer: Any = None,
    evaluate: bool = True,
    progress: Progress = quiet,
) -> Result:
    """As ``compress``, with all that a run knows; the recipe's ``evaluate`` is measured unless told otherwise.

    Raises InputError for a recipe, model or data that cannot be, CertificateError for a rotation that is not exact.
    """
    note_ties(check_model(model))
    asked = as_recipe(recipe)
    loaded = Loaded(model, tokenizer)
    made = outcome(loaded, asked, evaluate=evaluate, extras=False, progress=progress)
    return Result(made.model, made.report, made.bases, made.certificate, asked, made, tokenizer)
