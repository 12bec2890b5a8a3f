"""What slicing gives: the changed model, its layout, and how it came about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from jaxtyping import Float32, Float64
from torch import Tensor
from transformers import PreTrainedModel

from ..core.change import Basis
from ..model.layout import Layout
from ..model.verify import Certificate
from .demand import Widths
from .predict import UNTOLD, Foretold


@dataclass
class Sliced:
    """What slicing gives: the changed model (float64, blocks restructured), its layout, and how it came about.

    Where a receiver has taken its parts, the model is on meta.
    """

    model: PreTrainedModel
    layout: Layout
    widths: Widths
    spectra: dict[str, Float64[Tensor, "c d"]]
    certificate: Certificate
    seconds: dict[str, float] = field(default_factory=dict)
    foretold: Foretold = UNTOLD
    energy: dict[str, float] = field(
        default_factory=dict
    )  # kind of space → which share of its energy is cut
    search: dict[str, float] | None = None  # what a selector that measures asked for
    encodes: Mapping[str, Float32[Tensor, "d k"]] = field(
        default_factory=dict
    )  # of the points of the stream that changed
    narrower: dict[float, Widths] = field(
        default_factory=dict
    )  # the nested members' by their shares
    members: dict[float, Foretold] = field(default_factory=dict)  # of those
    bases: Mapping[str, Basis] = field(default_factory=dict)  # of every space that a step names
