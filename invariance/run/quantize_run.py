"""The last step of a run: the dense and the smaller model quantised alike, their bytes, errors and outliers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ..compress.outliers import of_stream, of_weights
from ..compress.rounding.apply import round_model
from ..compress.rounding.scheme import packed_bytes
from ..core.progress import Progress, quiet
from ..io.data import Tokens
from ..recipe.quantize import Quantize


@dataclass(frozen=True)
class Quantised:
    """The dense and the smaller model with rounded weights, and what the report says of them."""

    models: Mapping[str, PreTrainedModel]
    report: dict[str, Any]


def quantize_both(
    dense: PreTrainedModel,
    small: PreTrainedModel,
    asked: Quantize,
    stored: torch.dtype,
    tokens: Tokens | None = None,
    stream: bool = True,
    progress: Progress = quiet,
) -> Quantised:
    """Copies of both models with rounded weights. Outliers of the ``stream`` are looked for in ``tokens``, if given.

    ``small`` is what slicing, and recovery if any, have made; the dense model is quantised too, because that is the
    alternative to slicing at as many bytes.
    """
    plain = {"dense": dense, "sliced": small}
    names = {"dense": "dense_quantized", "sliced": "quantized"}
    made, size, error, weights, found_stream = {}, {}, {}, {}, {}
    for side, model in progress(list(plain.items()), "quantise", len(plain)):
        found = round_model(model, asked, tokens, progress)
        made[names[side]], error[names[side]] = found.model, found.error
        size[side], size[names[side]] = (
            packed_bytes(model, None, stored),
            packed_bytes(model, asked, stored),
        )
        weights[side] = of_weights(model, asked).to_dict()
    if tokens is not None and stream:
        found_stream = {
            side: of_stream(model, tokens, progress=progress).to_dict()
            for side, model in plain.items()
        }
    outliers = {"weights": weights, "stream": found_stream or None}
    return Quantised(
        made, {"bytes": size, "file_bytes": None, "rounding_error": error, "outliers": outliers}
    )
