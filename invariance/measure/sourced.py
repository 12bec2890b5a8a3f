"""A model that is read from where it lies, layer by layer: losses without having all of it in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from ..calibrate.enter import enter
from ..core.memory import trim
from ..core.progress import Progress
from ..core.spill import Spill
from ..io.data import Tokens
from ..io.models import load_config, load_model
from ..io.source import open_source
from ..model.families import declared
from ..model.source import Source, filled
from ..model.streamed import Streamed

DTYPE = torch.float32


@dataclass(frozen=True)
class Sourced:
    """Losses read a layer at a time; what generates text asks for the ``whole``."""

    source: Source
    device: str = "cpu"

    @property
    def config(self) -> PretrainedConfig:
        return self.source.config

    @property
    def dtype(self) -> torch.dtype:
        return DTYPE

    def parts(self) -> Streamed:
        return Streamed(self.source, DTYPE, self.device)

    def whole(self) -> PreTrainedModel:
        """In the dtype that is stored."""
        return filled(self.source, self.device)


Model = PreTrainedModel | Sourced


def opened(name: str, device: str, *, trust_remote_code: bool = False) -> Model:
    """A model to be measured: read part by part where its family is known, else loaded."""
    config = load_config(name, trust_remote_code=trust_remote_code)
    if declared(config):
        source = open_source(name, trust_remote_code=trust_remote_code)
        return Sourced(source, device)
    return load_model(name, device=device, trust_remote_code=trust_remote_code)


def whole(model: Model) -> PreTrainedModel:
    """All of a model in memory."""
    return model.whole() if isinstance(model, Sourced) else model


class Passed:
    """What layers make of tokens: the stream before the final norm, window by window."""

    def __init__(
        self, parts: Streamed, tokens: Tokens, batch: int, progress: Progress, what: str
    ) -> None:
        self.parts, self.states = parts, Spill()
        batches = enter(parts, list(tokens.batches(batch)), DTYPE)
        for n, b in enumerate(batches):
            self.states[n] = b.x
            b.x = torch.empty(0)
        for i in progress(range(parts.depth), what, parts.depth):
            layer = parts.layer(i)
            for n, b in enumerate(batches):
                out = layer(self.states[n].to(parts.device), **b.contexts[i])
                self.states[n] = out[0] if isinstance(out, tuple) else out
            del layer
            trim()

    def windows(self) -> Iterator[Float[Tensor, "1 T d"]]:
        for n in range(len(self.states)):
            yield from self.states[n].to(self.parts.device).split(1)


@torch.no_grad()
def losses(
    model: Sourced, tokens: Tokens, batch: int, progress: Progress, what: str
) -> Float[Tensor, "B P"]:
    """The cross-entropy of every next token in nats; the softmax over the vocabulary a part at a time."""
    passed = Passed(model.parts(), tokens, batch, progress, what)
    total = torch.full(tokens.ids[:, 1:].shape, -torch.inf)
    own = torch.zeros_like(total)
    for rows, logits in passed.parts.heads():
        for n, x in enumerate(passed.windows()):
            z = logits(x)[0, :-1].float().cpu()
            total[n] = torch.logaddexp(total[n], z.logsumexp(-1))
            own[n] += _of(z, rows, tokens.ids[n, 1:])
    return total - own


def _of(z: Float[Tensor, "P v"], rows: slice, ids: Int[Tensor, " P"]) -> Float[Tensor, " P"]:
    """The logits of some ids, 0 where they are of another part of the vocabulary."""
    here = (ids >= rows.start) & (ids < rows.stop)
    index = (ids - rows.start).clamp(0, z.shape[-1] - 1)
    return torch.where(here, z.gather(-1, index[:, None])[:, 0], 0.0)


class _Softmax:
    """log Σ exp z, the likeliest token and Σ exp(z) (z − other) of one model, over parts of the vocabulary."""

    def __init__(self, shape: torch.Size) -> None:
        self.top = torch.full(shape, -torch.inf)
        self.best = torch.zeros(shape, dtype=torch.long)
        self.mass = torch.zeros(shape, dtype=torch.float64)
        self.apart = torch.zeros(shape, dtype=torch.float64)
        self.own = torch.zeros(shape)

    def add(self, n: int, rows: slice, z: Tensor, other: Tensor, ids: Tensor) -> None:
        top, best = z.max(-1)
        self.best[n] = torch.where(top > self.top[n], best + rows.start, self.best[n])
        now = torch.maximum(top, self.top[n])
        shrink = (self.top[n] - now).double().exp()
        p = (z - now[:, None]).exp()
        self.mass[n] = self.mass[n] * shrink + p.sum(-1, dtype=torch.float64)
        self.apart[n] = self.apart[n] * shrink + (p * (z - other)).sum(-1, dtype=torch.float64)
        self.top[n] = now
        self.own[n] += _of(z, rows, ids)

    @property
    def total(self) -> Tensor:
        return self.top.double() + self.mass.log()


@torch.no_grad()
def compared(
    reference: Sourced, other: Sourced, tokens: Tokens, batch: int, progress: Progress, what: str
) -> tuple[Tensor, ...]:
    """KL(reference ‖ other), agreement, and the losses of both, of every next token."""
    sides = (reference, other)
    one, two = (Passed(m.parts(), tokens, batch, progress, what) for m in sides)
    step = min(one.parts.head_rows, two.parts.head_rows)
    ids = tokens.ids[:, 1:]
    p, q = _Softmax(ids.shape), _Softmax(ids.shape)
    heads = zip(one.parts.heads(step), two.parts.heads(step), strict=True)
    for (rows, of_one), (_, of_two) in heads:
        for n, (x, y) in enumerate(zip(one.windows(), two.windows(), strict=True)):
            a, b = (f(z)[0, :-1].float().cpu() for f, z in ((of_one, x), (of_two, y)))
            p.add(n, rows, a, b, ids[n])
            q.add(n, rows, b, b, ids[n])
    kl = (p.apart / p.mass - p.total + q.total).float()
    agreement = (p.best == q.best).float()
    return kl, agreement, (p.total - p.own).float(), (q.total - q.own).float()
