"""A cut against the model whose coordinates are zero: both compute the same, or the cut does not count."""

from __future__ import annotations

import copy

from transformers import PreTrainedModel

from ..derive.certify import distance, outputs
from ..derive.trace import Example
from ..described.description import Description
from .cut import Cut, cut, zero
from .positions import Kept


def tried(
    model: PreTrainedModel, description: Description, kept: Kept, example: Example
) -> tuple[PreTrainedModel, Cut, float]:
    """A narrower copy, what was done, and how far it is from the model with zeros: ‖cut − zeroed‖ / ‖zeroed‖."""
    small, reference = copy.deepcopy(model), copy.deepcopy(model)
    zero(reference, description, kept)
    done = cut(small, description, kept, example)
    return small, done, distance(outputs(reference, example), outputs(small, example))
