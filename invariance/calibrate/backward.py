"""Gradients of sampled labels by signals, one stage's graph at a time: forward once, then back through the stages."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..core.memory import trim
from ..core.progress import Progress
from ..core.spill import Spill
from ..io.data import Tokens
from ..model.axes import Edge
from ..model.modules import Stage
from ..model.working import Stages
from .batch import Batch
from .enter import enter
from .moments import real_tokens

DTYPE = torch.float32  # bfloat16's gradients are slow on CPUs
Taps = Callable[[Edge, Stage], AbstractContextManager[dict[str, Tensor]]]
BATCH = 1  # sequences that pass at once: the graph of one stage is in memory
Take = Callable[[str, Tensor, Tensor, Tensor], None]
"""What is done with a name's signal (B, T, w), the gradient by it, and which of the tokens count."""


def backward(
    parts: Stages,
    tokens: Tokens,
    taps: Taps,
    take: Take,
    *,
    skip: int,
    seed: int,
    progress: Progress,
) -> None:
    """g = ∂/∂x Σ_s log p(y_s) for signals x, with a label y_s ~ p drawn for every real token s, in float32.

    ``taps`` opens on a stage and on an edge, and holds the signals of a forward pass by their names; the stream where a
    stage begins, which ``take`` gets under the point's name, needs none. The last point comes first.
    """
    sequences = list(tokens.batches(BATCH))
    batches = enter(parts, sequences, DTYPE)
    inputs = Spill()
    edges = parts.layout.edges
    with torch.no_grad():
        for edge in progress(edges, "measure gradients, forward", len(edges)):
            stage = parts.stage(edge, DTYPE)
            for n, b in enumerate(batches):
                inputs[edge, n] = b.x
                b.x = b.through(stage, edge)
            del stage
            trim()
    g = torch.Generator().manual_seed(seed)
    real = [mask for _, mask in sequences]
    seen = [_counted(mask, skip) for mask in real]
    last = parts.layout.points[-1]
    behind = []
    for b, mask, counted in zip(batches, real, seen, strict=True):
        behind.append(_by_stream(parts, b.x, mask, g))
        take(last, b.x, behind[-1], counted)
    for edge in progress(edges[::-1], "measure gradients, backward", len(edges)):
        stage = parts.stage(edge, DTYPE).requires_grad_(False)
        for n in range(len(batches)):
            x = inputs.pop((edge, n)).to(parts.device).requires_grad_()
            with taps(edge, stage) as signals:
                gradients = _through(stage, edge, batches[n], x, behind[n], signals)
            behind[n] = gradients[0]
            for name, by_signal in zip(signals, gradients[1:], strict=True):
                take(name, signals[name].detach(), by_signal, seen[n])
            take(edge.source, x.detach(), behind[n], seen[n])
        del stage
        trim()


def _counted(mask: Bool[Tensor, "B T"], skip: int) -> Bool[Tensor, "B T"]:
    counted = mask.clone()
    counted[:, :skip] = False
    return counted


def _through(
    stage: Stage,
    edge: Edge,
    batch: Batch,
    x: Tensor,
    behind: Tensor,
    signals: dict[str, Tensor],
) -> tuple[Tensor, ...]:
    """The gradients by the stream before a stage and by the signals that it fills in, from that behind it."""
    with torch.enable_grad():
        y = stage(x, **batch.contexts[edge.block])
        return torch.autograd.grad(y, [x, *signals.values()], behind)


def _by_stream(
    parts: Stages, x: Float[Tensor, "B T d"], real: Bool[Tensor, "B T"], g: torch.Generator
) -> Float[Tensor, "B T d"]:
    """The gradient by the stream before the final norm."""
    with torch.no_grad():
        p = torch.cat([real_tokens(f(x), real) for _, f in parts.heads(DTYPE)], -1).softmax(-1)
    labels = sample(p, g)
    by_logits = p.neg_().scatter_add_(-1, labels[:, None], torch.ones_like(p[:, :1]))  # 1_y − p
    total = torch.zeros_like(x)
    for rows, f in parts.heads(DTYPE):
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            logits = real_tokens(f(leaf), real)
        total += torch.autograd.grad(logits, leaf, by_logits[:, rows])[0]
    return total


def sample(p: Float[Tensor, "n V"], g: torch.Generator) -> Int[Tensor, " n"]:
    """A label from each distribution, by its inverse distribution function."""
    distribution = p.cumsum(-1, dtype=torch.float64)
    u = torch.rand(len(p), 1, generator=g, dtype=torch.float64).to(p.device)
    found = torch.searchsorted(distribution, u * distribution[..., -1:], right=True)
    return found.squeeze(-1).clamp_max(p.shape[-1] - 1)
