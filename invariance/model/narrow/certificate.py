"""A cut against the model whose coordinates are zero, and whose experts are never chosen: both compute the same, or the
cut does not count."""

from __future__ import annotations

import copy

from transformers import PreTrainedModel

from ...core.errors import InputError
from ..derive.certify import TOLERANCE, distance, outputs
from ..derive.trace import Example
from ..described.description import Description
from .cut import Cut, cut, plan, zero
from .experts import NeverChosen
from .positions import Kept


def tried(
    model: PreTrainedModel, description: Description, kept: Kept, example: Example
) -> tuple[PreTrainedModel, Cut, float]:
    """A narrower copy, what was done, and how far it is from the model with zeros: ‖cut − zeroed‖ / ‖zeroed‖.

    Of several ways the first is taken that computes the same; where none does, the last error is raised, or the
    nearest given.
    """
    reference = copy.deepcopy(model)
    zero(reference, description, kept)
    with NeverChosen(reference, description.flat(), kept):
        wanted = outputs(reference, example)
    todo = plan(model, description, kept, example)
    best: tuple[PreTrainedModel, Cut, float] | None = None
    last: Exception | None = None
    for way in todo.ways():
        small = copy.deepcopy(model)
        try:
            done = cut(small, description, kept, todo, way)
            error = distance(wanted, outputs(small, example))
        except (RuntimeError, ValueError, AttributeError) as e:  # shapes that do not fit
            last = e
            continue
        if best is None or error < best[2]:
            best = small, done, error
        if error <= TOLERANCE:
            break
    if best is None:
        raise InputError(
            f"cut: the narrower model does not run: {last}. Cut another space."
        ) from last
    return best
