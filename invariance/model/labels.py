"""The layout of a model, by the architecture that is read of its config."""

from __future__ import annotations

from transformers import PreTrainedModel

from .families import architecture
from .labelling import labelled
from .layout import Layout


def label(model: PreTrainedModel) -> Layout:
    """The layout of a restructured model (also one already rotated, sliced, or on the meta device)."""
    return labelled(model, architecture(model.config))
