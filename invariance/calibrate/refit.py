"""Refit what writes and what reads the residual stream, so that the sliced model follows the dense one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..core.change import Change
from ..model.axes import Edge
from ..model.folding import assign
from ..model.layout import Layout
from ..model.modules import Stage
from .batch import Batch
from .moments import real_tokens, weights
from .outer import add_outer

SHRINKAGE = (1e-2, 1e-1, 1.0, 10.0)  # fractions of the mean eigenvalue of H, the weakest first
HELD_OUT = 4  # one sequence in so many chooses the shrinkage, neighbours two by two
MIXES = 64  # random combinations of the targets, which rank shrinkages: their loss is that of all on average


@dataclass
class Normal:
    """The normal equations of one regression: H = Σ w h hᵀ, G = Σ w h tᵀ, s = Σ w h, n tokens of weight ``total``."""

    H: Float64[Tensor, "k k"]
    G: Float64[Tensor, "k d"]
    s: Float64[Tensor, " k"]
    n: int = 0
    total: float = 0.0

    @classmethod
    def empty(cls, k: int, d: int, device: torch.device) -> Normal:
        H, G, s = (
            torch.zeros(n, dtype=torch.float64, device=device) for n in ((k, k), (k, d), (k,))
        )
        return cls(H, G, s)

    def add(
        self, h: Float[Tensor, "n k"], t: Float[Tensor, "n d"], w: Float[Tensor, "n 1"] | None
    ) -> None:
        """Take in n tokens; without weights they count by 1."""
        count = float(len(h))
        if w is not None:
            count, root = w.double().sum().item(), w.float().sqrt()
            h, t = (h.float() * root).to(h.dtype), t.float() * root
        add_outer(h[None], self.H[None])
        self.G += h.float().mT @ t.float()
        self.s += h.sum(0, dtype=torch.float32) if w is None else h.float().mT @ root[:, 0]
        self.n, self.total = self.n + len(h), self.total + count

    def __add__(self, other: Normal) -> Normal:
        H, G, s = self.H + other.H, self.G + other.G, self.s + other.s
        return Normal(H, G, s, self.n + other.n, self.total + other.total)

    def single(self) -> Normal:
        """The same in float32."""
        return replace(self, H=self.H.float(), G=self.G.float(), s=self.s.float())

    def beyond(self, W: Float64[Tensor, "d k"], bias: Float64[Tensor, " d"]) -> Normal:
        """The equations for what W h + bias leaves of the targets."""
        return replace(self, G=self.G - self.H @ W.mT - self.s[:, None] * bias)

    def solve(self, shrinkage: float) -> Float64[Tensor, "k d"]:
        """argmin Σ w‖t − Δᵀh‖² + λ‖Δ‖²."""
        eye = torch.eye(self.H.shape[0], dtype=self.H.dtype, device=self.H.device)
        scale = self.H.diagonal().mean().clamp_min(torch.finfo(self.H.dtype).tiny)
        return torch.cholesky_solve(self.G, torch.linalg.cholesky(self.H + shrinkage * scale * eye))

    def loss(self, delta: Float64[Tensor, "k d"]) -> float:
        """Σ w‖t − Δᵀh‖² less Σ w‖t‖²: negative where Δ helps."""
        return ((self.H @ delta - 2 * self.G) * delta).sum().item()


class _Tap(nn.Module):
    """Stands in a writer's place, keeps what it would have read, and writes nothing."""

    def __init__(self, kept: list[Tensor]) -> None:
        super().__init__()
        self.kept = kept

    def forward(self, h: Tensor) -> Tensor:
        self.kept.append(h)
        return h.new_zeros(1)


class Follower:
    """Gathers one stage's regression while batches pass it, then changes the stage's writers in a model.

    The features h are what the writers (of all branches together) read, the targets t what the dense stream after
    the stage has beyond the sliced stream before it. Every token counts by w = 1/mean(x²) of its dense stream, as
    the next norm sees it. Where that norm stands behind the writers already, t is what they give in the dense model
    and w = 1/mean(t²): nothing can be added up across a norm. Writers W become W + Δᵀ, where Δ regresses what W h
    leaves of t on h. λ is the one that predicts held-out sequences best; none of them may help, then Δ = 0.
    """

    def __init__(self, edge: Edge, stage: Stage) -> None:
        """``stage`` is a copy of the stage at ``edge``; its writers are taken out of it, since none has to compute."""
        self.edge, self.stage = edge, stage
        self.writers = dict(_writers(stage))
        self.read: list[Tensor] = []  # of the batch that passes now
        self.kept: list[Tensor] = []  # of all batches
        self.sequences = 0
        if stage.attention is not None:
            stage.attention.out = _Tap(self.read)  # type: ignore[assignment]
        if stage.mlp is not None:
            stage.mlp.down = _Tap(self.read)  # type: ignore[assignment]
        self.parts: tuple[Normal, Normal] | None = None

    def add(self, batch: Batch, dense: Tensor) -> None:
        """Run the stage on a batch and take it in; ``dense`` is the dense stream behind the stage, or what is written in
        the dense model where a norm stands behind that."""
        if not self.writers:
            return
        self.stage.write(batch.x, **batch.contexts[self.edge.block])
        self.kept.append(torch.cat(self.read, dim=-1) if len(self.read) > 1 else self.read[0])
        self.read.clear()
        target = (
            dense.float() if self.edge.post else dense.float() - self.stage.carry(batch.x).float()
        )
        self.parts = gather(
            self.parts, self.sequences, batch.mask, self.kept[-1], target, weights(dense)
        )
        self.sequences += len(dense)

    def refit(self, model: PreTrainedModel, batches: list[Batch]) -> None:
        """Change the writers of the stage, and carry the batches behind it. A stage that has none passes them on."""
        if self.parts is None:
            for batch in batches:
                batch.x = self.stage.carry(batch.x)
            return
        train, held = self.parts
        stage = model.get_submodule(self.edge.stage)
        modules = [module for _, module in _writers(stage)]  # type: ignore[arg-type]
        W = torch.cat([module.weight.double() for module in modules], dim=1)
        bias = torch.zeros_like(W[:, 0])
        for module in modules:
            bias = bias if module.bias is None else bias + module.bias.double()
        train, held = train.beyond(W, bias), held.beyond(W, bias)
        shrinkage = best_shrinkage(train, held) if held.n else None
        if shrinkage is not None:
            W = W + (train + held).solve(shrinkage).mT
        parts = W.split([m.in_features for m in self.writers.values()], dim=1)
        for name, part in zip(self.writers, parts, strict=True):
            assign(model, f"{self.edge.stage}.{name}.weight", part)
        for batch, h in zip(batches, self.kept, strict=True):
            written = nn.functional.linear(h, W.to(h.dtype), bias.to(h.dtype))
            batch.x = self.stage.land(batch.x, [written])
        self.kept.clear()


def refit_readers(
    model: PreTrainedModel,
    layout: Layout,
    edge: Edge,
    batches: Sequence[Batch],
    dense: Sequence[Tensor],
    uncut: Stage,
    change: Change | None,
) -> None:
    """Let what reads the stream at the beginning of a stage make up for what the stream has become.

    A reader W takes the normed signal n' of the sliced stream where it took n of the dense one. It becomes
    W (D + Δᵀ), where Δ regresses n − D n' on n', all tokens alike, and D is the decode of the cut that the point has
    just had (``change``; else the identity). λ as in ``Follower``.
    """
    norm = model.get_submodule(f"{edge.stage}.norm")
    assert uncut.norm is not None
    parts: tuple[Normal, Normal] | None = None
    sequences = 0
    for batch, x in zip(batches, dense, strict=True):
        h, goal = norm(batch.x).float(), uncut.norm(x).float()
        target = goal - (h if change is None else change.decode.back(h))
        parts = gather(parts, sequences, batch.mask, h, target)
        sequences += len(x)
    assert parts is not None
    train, held = parts
    shrinkage = best_shrinkage(train, held) if held.n else None
    if shrinkage is None:
        return
    delta = (train + held).solve(shrinkage)
    for name, _ in layout.readers(edge.source):
        if name.startswith(f"{edge.stage}."):
            W = uncut.get_parameter(name.removeprefix(f"{edge.stage}.")).double()
            assign(model, name, model.get_parameter(name).double() + W @ delta.mT)


def gather(
    parts: tuple[Normal, Normal] | None,
    first: int,
    mask: Tensor | None,
    h: Float[Tensor, "B T k"],
    t: Float[Tensor, "B T d"],
    w: Float[Tensor, "B T 1"] | None = None,
) -> tuple[Normal, Normal]:
    """The equations to fit on and those held out, with a batch of sequences, from number ``first``, taken in."""
    shape = h.shape[-1], t.shape[-1]
    parts = parts or (Normal.empty(*shape, h.device), Normal.empty(*shape, h.device))
    for held, rows in spans(
        first, len(h)
    ):  # slices, since picking single sequences would copy them
        real = None if mask is None else mask[rows]
        parts[held].add(*(None if x is None else real_tokens(x[rows], real) for x in (h, t, w)))  # type: ignore[arg-type]
    return parts


def spans(first: int, count: int) -> list[tuple[bool, slice]]:
    """Runs of ``count`` sequences from number ``first``: those that fit, and those held out to choose the shrinkage.

    Two at a time are held out, since every run costs one more sum of a matrix of all features.
    """
    runs = groupby(range(count), key=lambda i: (first + i) % (2 * HELD_OUT) < 2)
    each = [(held, list(rows)) for held, rows in runs]
    return [(held, slice(rows[0], rows[-1] + 1)) for held, rows in each]


def _writers(stage: Stage) -> Iterator[tuple[str, nn.Linear]]:
    for branch, name in (("attention", "out"), ("mlp", "down")):
        linear = stage.linears().get(name)
        if linear is not None:
            assert isinstance(linear, nn.Linear)  # a plan refuses to refit one of two factors
            yield f"{branch}.{name}", linear


def best_shrinkage(
    train: Normal, held: Normal, choices: Sequence[float] = SHRINKAGE
) -> float | None:
    """The shrinkage whose solution on ``train`` loses least on ``held``; None where changing nothing is better."""
    train, held = train.single(), held.single()  # enough to rank them
    if (d := train.G.shape[1]) > MIXES:
        mix = torch.randn(d, MIXES, generator=torch.Generator().manual_seed(0)).to(train.G.device)
        train, held = replace(train, G=train.G @ mix), replace(held, G=held.G @ mix)
    losses: list[float] = []
    for shrinkage in choices:
        losses.append(held.loss(train.solve(shrinkage)))
        if losses[-1] > min(losses):  # beyond the best of them they only get worse
            break
    loss, best = min(zip(losses, choices, strict=False))
    return best if loss < 0 else None
