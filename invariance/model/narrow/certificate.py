"""A cut against the model whose coordinates are zero, and whose experts are never chosen: both compute the same, or the
cut does not count."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor
from transformers import PreTrainedModel

from ...core.errors import InputError
from ..derive.certify import TOLERANCE, distance, outputs
from ..derive.trace import Example
from ..described.description import Description
from .cut import Cut, Plan, Way, cut, plan, zero
from .experts import NeverChosen
from .positions import Kept
from .spoken import Changes, mark

CONFIGS = 4  # that are tried


def reference(
    model: PreTrainedModel, description: Description, kept: Kept, example: Example
) -> Tensor:
    """The outputs of the model whose coordinates are zero where they are not kept, and whose experts are never chosen."""
    twin = copy.deepcopy(model)
    zero(twin, description, kept)
    with NeverChosen(twin, description.flat(), kept):
        return outputs(twin, example)


def tried(
    model: PreTrainedModel, description: Description, kept: Kept, example: Example
) -> tuple[PreTrainedModel, Cut, float]:
    """A narrower copy, what was done, and how far it is from the model with zeros: ‖cut − zeroed‖ / ‖zeroed‖.

    Of several ways, and several configs that say the shapes, the first is taken that computes the same; where none does,
    the last error is raised, or the nearest given.
    """
    wanted = reference(model, description, kept, example)
    best: tuple[PreTrainedModel, Cut, float] | None = None
    last: Exception | None = None
    for way, todo in _ways(model, description, kept, example):
        small = copy.deepcopy(model)
        try:
            done = cut(small, description, kept, todo, way)
            error = distance(wanted, outputs(small, example))
        except (RuntimeError, ValueError, AttributeError, LookupError, TypeError) as e:
            last = e  # shapes that do not fit
            continue
        if best is None or error < best[2]:
            best = small, done, error
        if error <= TOLERANCE:
            break
    if best is None:
        raise InputError(
            f"cut: the family's own modules do not run with these widths ({last}). Cut another space."
        ) from last
    return best


def _ways(
    model: PreTrainedModel, description: Description, kept: Kept, example: Example
) -> Iterator[tuple[Way, Plan]]:
    """Some configs that say the shapes, then none of them, each with the ways that there are."""
    but: set[Changes] = set()
    for _ in range(CONFIGS):
        todo = plan(model, description, kept, example, but)
        yield from ((way, todo) for way in todo.ways())
        if todo.search.said is None:
            return
        but.add(mark(todo.search.said.changes))
    unsaid = replace(todo, search=replace(todo.search, said=None))
    yield from ((way, unsaid) for way in unsaid.ways())
