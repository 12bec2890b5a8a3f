"""Losses token by token: perplexity, and how far one model's predictions are from another's, by position."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from ..core.errors import InputError
from ..core.progress import Progress, quiet
from ..io.data import Tokens
from . import sourced
from .sourced import Model, Sourced, whole

FIRST_BUCKET = (
    16  # positions 1 to 15 are one bucket; each further one ends where its positions have doubled
)

Each = Float[Tensor, "B P"]  # a number for every token that is predicted, P = T − 1, by window


@dataclass(frozen=True)
class Mean:
    """A mean over tokens and its standard error, for which each window is one observation."""

    value: float
    standard_error: float | None  # of a single window: unknown
    tokens: int

    @classmethod
    def over(cls, values: Each, counted: Bool[Tensor, "B P"]) -> Mean:
        sums = torch.where(counted, values.double(), 0.0).sum(
            1
        )  # of what is left out, nothing is known
        counts = counted.sum(1)
        total, windows = int(counts.sum()), int((counts > 0).sum())
        mean = float(sums.sum() / max(total, 1))
        if windows < 2 or not math.isfinite(mean):
            return cls(mean, None, total)
        spread = (sums - mean * counts).square().sum() * windows / (windows - 1)
        return cls(mean, float(spread.sqrt()) / total, total)

    @property
    def exp(self) -> float:
        """exp of the mean; of one that is not a number: not a number."""
        return math.exp(self.value) if not self.value >= 700 else math.inf


def scored(tokens: Tokens, stride: int | None = None) -> Bool[Tensor, "B P"]:
    """Which tokens count: real ones after real ones; where windows overlap, those that no earlier window had."""
    real = tokens.mask[:, 1:] & tokens.mask[:, :-1]
    if stride is not None and stride < real.shape[1] + 1:
        real = real.clone()
        real[1:, : real.shape[1] - stride] = False
    return real


@torch.no_grad()
def token_losses(
    model: Model,
    tokens: Tokens,
    batch: int = 8,
    progress: Progress = quiet,
    what: str = "losses",
) -> Each:
    """The cross-entropy of every next token in nats, every window on its own; float32 logits."""
    if isinstance(model, Sourced):
        return sourced.losses(model, tokens, batch, progress, what)
    found = []
    for ids, mask in _batches(tokens, batch, progress, what):
        for row, target in zip(_logits(model, ids, mask), ids[:, 1:], strict=True):
            found.append(cross_entropy(row.float(), target.to(row.device), reduction="none").cpu())
    return torch.stack(found)


def perplexity(
    model: Model,
    tokens: Tokens,
    batch: int = 8,
    progress: Progress = quiet,
    what: str = "perplexity",
) -> float:
    """exp of the mean next-token cross-entropy (nats), every window on its own, padding left out; float32 logits."""
    return Mean.over(token_losses(model, tokens, batch, progress, what), scored(tokens)).exp


@dataclass(frozen=True, eq=False)
class Divergence:
    """Two models on the same windows: KL(reference ‖ other), whether their likeliest tokens agree, and their losses."""

    counted: Bool[Tensor, "B P"]
    kl: Each
    agreement: Each
    reference: Each
    other: Each

    def to_dict(self) -> dict[str, Any]:
        """Over all tokens, and by how many tokens stand before the one that is predicted."""
        width = self.counted.shape[1]
        positions = [
            {"from": first, "to": last, **self._within(first, last)}
            for first, last in buckets(width)
        ]
        return {**self._within(1, width), "window": width + 1, "positions": positions}

    def _within(self, first: int, last: int) -> dict[str, Any]:
        part = slice(first - 1, last)
        counted = self.counted[:, part]
        kl, agreement, extra = (
            Mean.over(v[:, part], counted)
            for v in (self.kl, self.agreement, self.other - self.reference)
        )
        return {
            "tokens": kl.tokens,
            "kl": kl.value,
            "kl_standard_error": kl.standard_error,
            "agreement": agreement.value,
            "agreement_standard_error": agreement.standard_error,
            "reference_loss": Mean.over(self.reference[:, part], counted).value,
            "extra_loss": extra.value,
            "extra_loss_standard_error": extra.standard_error,
        }


@torch.no_grad()
def divergence(
    reference: Model,
    other: Model,
    tokens: Tokens,
    batch: int = 8,
    progress: Progress = quiet,
    what: str = "divergence",
) -> Divergence:
    """KL(reference ‖ other) in nats, agreement and losses of every next token; float32 logits."""
    if isinstance(reference, Sourced) and isinstance(other, Sourced):
        each = sourced.compared(reference, other, tokens, batch, progress, what)
        return Divergence(scored(tokens), *each)
    reference, other = whole(reference), whole(other)
    found: list[tuple[Tensor, ...]] = []
    for ids, mask in _batches(tokens, batch, progress, what):
        for p, q, target in zip(
            _logits(reference, ids, mask), _logits(other, ids, mask), ids[:, 1:], strict=True
        ):
            p, q = p.float().log_softmax(-1), q.to(p.device).float().log_softmax(-1)
            target = target.to(p.device)[:, None]
            kl = (p.exp() * (p - q)).sum(-1)
            agreement = (p.argmax(-1) == q.argmax(-1)).float()
            losses = (-p.gather(-1, target)[:, 0], -q.gather(-1, target)[:, 0])
            found.append(tuple(v.cpu() for v in (kl, agreement, *losses)))
    return Divergence(scored(tokens), *(torch.stack(column) for column in zip(*found, strict=True)))


def buckets(width: int) -> list[tuple[int, int]]:
    """The positions 1 to ``width`` in buckets that double, first and last of each."""
    edges = [1]
    while (edge := max(FIRST_BUCKET, 2 * edges[-1])) <= width:
        edges.append(edge)
    return list(zip(edges, [e - 1 for e in edges[1:]] + [width], strict=True))


def check_windows(tokens: Tokens, where: str) -> None:
    """Raises InputError for windows of one token, after which nothing is predicted."""
    if tokens.ids.shape[1] < 2:
        raise InputError(
            f"{where}: windows of 1 token predict nothing. Give windows of 2 tokens or more."
        )


def _batches(
    tokens: Tokens, batch: int, progress: Progress, what: str
) -> Iterator[tuple[Tensor, Tensor]]:
    batches = list(tokens.batches(batch))
    yield from progress(batches, what, len(batches))


def _logits(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """The logits of all tokens but the last."""
    padded = None if bool(mask.all()) else mask.long().to(model.device)
    return model(input_ids=ids.to(model.device), attention_mask=padded, use_cache=False).logits[
        :, :-1
    ]
