"""Refit what writes the residual stream, so that the sliced stream follows the dense one and errors stop adding up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn
from transformers import PreTrainedModel

from .canonical import assign
from .layout import Edge
from .modules import Stage
from .moments import outer, real_tokens

SHRINKAGE = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 10.0)  # fractions of the mean eigenvalue of H
HELD_OUT = 4  # one sequence in so many chooses the shrinkage


@dataclass
class Normal:
    """The normal equations of one regression: H = Σ w h hᵀ, G = Σ w h rᵀ, n tokens."""

    H: Float64[Tensor, "k k"]
    G: Float64[Tensor, "k d"]
    n: int = 0

    def add(self, h: Float[Tensor, "n k"], r: Float[Tensor, "n d"]) -> None:
        self.H += outer(h[None])[0]
        self.G += (h.float().mT @ r.float()).double()
        self.n += h.shape[0]

    def __add__(self, other: Normal) -> Normal:
        return Normal(self.H + other.H, self.G + other.G, self.n + other.n)

    def solve(self, shrinkage: float) -> Float64[Tensor, "k d"]:
        """argmin Σ w‖r − Δᵀh‖² + λ‖Δ‖²."""
        eye = torch.eye(self.H.shape[0], dtype=self.H.dtype, device=self.H.device)
        scale = self.H.diagonal().mean().clamp_min(torch.finfo(self.H.dtype).tiny)
        return torch.cholesky_solve(self.G, torch.linalg.cholesky(self.H + shrinkage * scale * eye))

    def loss(self, delta: Float64[Tensor, "k d"]) -> float:
        """Σ w‖r − Δᵀh‖² less Σ w‖r‖²: negative where Δ helps."""
        return ((self.H @ delta - 2 * self.G) * delta).sum().item()


class Follower:
    """Gathers one stage's regression while batches pass it, then changes the stage's writers in a model.

    Writers W (of all branches together) become W + Δᵀ, where Δ regresses r, the dense stream after the stage minus
    the stream that arrives, on h, what the writers read. Every token counts by 1/mean(x²) of its dense stream, as
    the next norm sees it. λ is the one that predicts held-out batches best; none of them may help, then Δ = 0.
    """

    def __init__(self, edge: Edge, stage: Stage) -> None:
        self.edge, self.stage = edge, stage
        self.read: list[Tensor] = []
        self.sequences = 0
        self.writers: list[tuple[str, nn.Linear]] = []
        if stage.attention is not None:
            self.writers.append(("attention.out", stage.attention.out))
        if stage.mlp is not None:
            self.writers.append(("mlp.down", stage.mlp.down))
        self.handles = [
            w.register_forward_pre_hook(lambda _m, a: self.read.append(a[0])) for _, w in self.writers
        ]
        width = sum(w.in_features for _, w in self.writers)
        target = self.writers[0][1].out_features
        device = self.writers[0][1].weight.device
        self.parts = [
            Normal(
                torch.zeros(width, width, dtype=torch.float64, device=device),
                torch.zeros(width, target, dtype=torch.float64, device=device),
            )
            for _ in range(2)
        ]

    def add(self, arrived: Tensor, dense: Tensor, mask: Tensor | None) -> None:
        """Take in a batch: the stream that arrived behind the stage, and the dense one."""
        held = torch.arange(self.sequences, self.sequences + len(dense)) % HELD_OUT == HELD_OUT - 1
        self.sequences += len(dense)
        for part, chosen in zip(self.parts, (~held, held), strict=True):
            if not chosen.any():
                continue
            real = None if mask is None else mask[chosen]
            h = torch.cat([real_tokens(x[chosen], real) for x in self.read], dim=-1)
            goal, have = (real_tokens(x[chosen], real).float() for x in (dense, arrived))
            weight = torch.rsqrt(goal.square().mean(-1, keepdim=True).clamp_min(1e-12))
            part.add((h.float() * weight).to(h.dtype), (goal - have) * weight)
        self.read.clear()

    def refit(self, model: PreTrainedModel) -> None:
        """Change the writers of the stage in the model."""
        for handle in self.handles:
            handle.remove()
        train, held = self.parts
        shrinkage = best_shrinkage(train, held) if held.n else None
        if shrinkage is None:
            return
        delta = (train + held).solve(shrinkage)
        start = 0
        for name, writer in self.writers:
            rows = delta[start : start + writer.in_features]
            start += writer.in_features
            path = f"{self.edge.stage}.{name}.weight"
            assign(model, path, model.get_parameter(path).double() + rows.mT)


def best_shrinkage(train: Normal, held: Normal, choices: Sequence[float] = SHRINKAGE) -> float | None:
    """The shrinkage whose solution on ``train`` loses least on ``held``; None where changing nothing is better."""
    loss, best = min((held.loss(train.solve(s)), s) for s in choices)
    return best if loss < 0 else None
