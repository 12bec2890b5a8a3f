"""How far the largest numbers stand out: of weights within their groups, of the residual stream within tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from ..core.progress import Progress, quiet
from ..io.data import Tokens
from ..recipe.quantize import Quantize
from .rounding.scheme import scheme

WINDOWS = 8  # of calibration that the stream is looked at in; more change the third digit

CHUNK = 2**16  # runs that are made float64 at a time


@dataclass(frozen=True)
class Outliers:
    """Of runs of numbers: the mean and the largest max/RMS, between 1 and the root of their length, and the mean
    kurtosis E[x⁴]/E[x²]², which is 3 of a long run of Gaussian numbers. Runs of zeros are left out."""

    peak: float
    largest_peak: float
    kurtosis: float

    @classmethod
    def of(cls, runs: Iterable[Float[Tensor, "r n"]]) -> Outliers:
        count, peaks, fourths, largest = 0, 0.0, 0.0, 0.0
        for x in (part for each in runs for part in each.split(CHUNK)):
            x = x.double()
            x = x[x.abs().amax(1) > 0]
            x = x / x.square().mean(1, keepdim=True).sqrt()
            peak = x.abs().amax(1)
            count += len(x)
            peaks += peak.sum().item()
            fourths += x.pow(4).mean(1).sum().item()
            largest = max(largest, peak.amax().item() if len(x) else 0.0)
        return cls(peaks / max(count, 1), largest, fourths / max(count, 1))

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def of_weights(model: PreTrainedModel, asked: Quantize) -> Outliers:
    """Of the weights that would be rounded, in their groups."""
    weights = (model.get_submodule(path).get_parameter("weight") for path in scheme(model, asked))
    return Outliers.of(W.detach().reshape(-1, asked.group) for W in weights)


def of_stream(
    model: PreTrainedModel, tokens: Tokens, batch: int = 8, progress: Progress = quiet
) -> Outliers:
    """Of what arrives at every block, token by token over the channels; padding left out."""
    return Outliers.of(_tokens(model, tokens, batch, progress))


@torch.no_grad()
def _tokens(
    model: Any, tokens: Tokens, batch: int, progress: Progress
) -> Iterator[Float[Tensor, "r n"]]:
    first = Tokens(tokens.ids[:WINDOWS], tokens.mask[:WINDOWS])
    batches = list(first.batches(batch))
    for ids, mask in progress(batches, "outliers", len(batches)):
        states = model(
            input_ids=ids.to(model.device),
            attention_mask=mask.long().to(model.device),
            use_cache=False,
            output_hidden_states=True,
            logits_to_keep=1,
        ).hidden_states
        for x in states[:-1]:  # the last one is behind the final norm
            yield x.cpu()[mask]
