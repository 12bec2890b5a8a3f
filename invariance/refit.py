"""Refit what writes and what reads the residual stream, so that the sliced model follows the dense one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from einops import rearrange, reduce
from jaxtyping import Float, Float64
from torch import Tensor, nn
from transformers import PreTrainedModel

from .canonical import assign
from .interfaces import Statistic
from .layout import Axis, Edge, Layout, Role
from .modules import Stage
from .moments import Moment, Moments, outer, real_tokens
from .reparametrize import along, contract
from .space import Change

if TYPE_CHECKING:
    from .walk import Batch

SHRINKAGE = (1e-2, 1e-1, 1.0, 10.0)  # fractions of the mean eigenvalue of H
HELD_OUT = 4  # one sequence in so many chooses the shrinkage


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
        H, G, s = (torch.zeros(n, dtype=torch.float64, device=device) for n in ((k, k), (k, d), (k,)))
        return cls(H, G, s)

    def add(self, h: Float[Tensor, "n k"], t: Float[Tensor, "n d"], w: Float[Tensor, "n 1"]) -> None:
        root = w.sqrt()
        scaled = (h.float() * root).to(h.dtype)
        self.H += outer(scaled[None])[0]
        self.G += (scaled.float().mT @ (t.float() * root)).double()
        self.s += (scaled.float().mT @ root)[:, 0].double()
        self.n, self.total = self.n + h.shape[0], self.total + w.double().sum().item()

    def __add__(self, other: Normal) -> Normal:
        H, G, s = self.H + other.H, self.G + other.G, self.s + other.s
        return Normal(H, G, s, self.n + other.n, self.total + other.total)

    def single(self) -> Normal:
        """The same in float32."""
        return replace(self, H=self.H.float(), G=self.G.float(), s=self.s.float())

    def along(self, narrow: Callable[[Tensor, int], Tensor]) -> Normal:
        """The equations for narrower features; ``narrow(tensor, dim)`` maps one axis of features to theirs."""
        H = narrow(narrow(self.H, 0), 1)
        return replace(self, H=H, G=narrow(self.G, 0), s=narrow(self.s, 0))

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


@dataclass(frozen=True)
class Writer:
    """A weight that writes the stream, and the axis along which it reads."""

    name: str
    module: nn.Linear
    axis: Axis
    width: int


class Follower:
    """Gathers one stage's regression while batches pass it uncut, then changes the stage's writers in a model.

    The features h are what the writers (of all branches together) read, the targets t what the dense stream after
    the stage has beyond the sliced stream before it. Every token counts by w = 1/mean(x²) of its dense stream, as
    the next norm sees it. Cut writers W become W + Δᵀ, where Δ regresses what W leaves of t on what h leaves of
    itself. λ is the one that predicts held-out sequences best; none of them may help, then Δ = 0.
    """

    def __init__(self, layout: Layout, edge: Edge, stage: Stage) -> None:
        """``stage`` is a copy of the stage at ``edge``; its writers are taken out of it, since none has to compute."""
        self.layout, self.edge, self.stage = layout, edge, stage
        self.writers = [
            Writer(f"{edge.stage}.{name}", module, axis, module.in_features)
            for name, module in _writers(stage)
            if (axis := layout.axes[f"{edge.stage}.{name}.weight"][1]) is not None
        ]
        self.read: list[Tensor] = []  # of the batch that passes now
        self.kept: list[Tensor] = []  # of all batches
        self.sequences = 0
        if stage.attention is not None:
            stage.attention.out = _Tap(self.read)  # type: ignore[assignment]
        if stage.mlp is not None:
            stage.mlp.down = _Tap(self.read)  # type: ignore[assignment]
        shape = sum(w.width for w in self.writers), self.writers[0].module.out_features
        self.parts = [Normal.empty(*shape, self.writers[0].module.weight.device) for _ in range(2)]

    def add(self, batch: Batch, dense: Tensor) -> None:
        """Run the stage on a batch and take it in; ``dense`` is the dense stream behind the stage."""
        batch.through(self.stage, self.edge)
        self.kept.append(torch.cat(self.read, dim=-1))
        self.read.clear()
        target = dense.float() - self._passed_by(batch.x).float()
        for part, chosen in zip(self.parts, halves(self.sequences, len(dense)), strict=True):
            if chosen.any():
                real = None if batch.mask is None else batch.mask[chosen]
                h, t, x = (real_tokens(y[chosen], real) for y in (self.kept[-1], target, dense))
                part.add(h, t, 1 / x.float().square().mean(-1, keepdim=True).clamp_min(1e-12))
        self.sequences += len(dense)

    def _passed_by(self, x: Tensor) -> Tensor:
        """What reaches the end of the stage beside its branches."""
        return x if self.stage.shortcut is None else x @ self.stage.shortcut.to(x.dtype)

    def moments(self) -> Moments:
        """E[x xᵀ] of the spaces that the writers read, tokens weighted as in the regression."""
        every = self.parts[0] + self.parts[1]
        scale = every.n / max(every.total, 1e-300)
        moments, start = Moments(), 0
        for w in self.writers:
            block = every.H[start : start + w.width, start : start + w.width] * scale
            start += w.width
            copies = self.layout.spaces[w.axis.space].copies
            apart = rearrange(block, "(h d) (g e) -> h g d e", h=w.axis.heads, g=w.axis.heads)
            heads = apart.diagonal(dim1=0, dim2=1).movedim(-1, 0)
            total = reduce(heads, "(c r) d e -> c d e", "sum", c=copies)
            moments.known[w.axis.space, Statistic.RAW] = Moment(total, every.n)
            if w.axis.outer is not None:
                moments.known[w.axis.outer.space, Statistic.RAW] = Moment(block[None], every.n)
        return moments

    def refit(self, model: PreTrainedModel, changes: Mapping[str, Change], batches: list[Batch]) -> None:
        """Change the writers of the stage, which were cut by ``changes``, and carry the batches behind it.

        A stage that has no writers left passes them on.
        """
        cut = {
            f"{self.edge.stage}.{name}": module
            for name, module in _writers(model.get_submodule(self.edge.stage))  # type: ignore[arg-type]
        }
        if not cut:
            for batch in batches:
                batch.x = self._passed_by(batch.x)
            self.kept.clear()
            return

        def narrow(T: Tensor, dim: int) -> Tensor:
            parts = T.split([w.width for w in self.writers], dim)
            return torch.cat(
                [_cut(p, dim, w, changes) for p, w in zip(parts, self.writers, strict=True)], dim
            )

        train, held = (part.along(narrow) for part in self.parts)
        W = torch.cat([m.weight.double() for m in cut.values()], dim=1)
        bias = torch.zeros_like(W[:, 0])
        for module in cut.values():
            bias = bias if module.bias is None else bias + module.bias.double()
        train, held = train.beyond(W, bias), held.beyond(W, bias)
        shrinkage = best_shrinkage(train, held) if held.n else None
        if shrinkage is not None:
            W = W + (train + held).solve(shrinkage).mT
        parts = dict(zip(cut, W.split([m.in_features for m in cut.values()], dim=1), strict=True))
        for name, part in parts.items():
            assign(model, f"{name}.weight", part)
        whole = torch.cat(
            [
                _uncut(parts[w.name], w, changes) if w.name in parts else W.new_zeros(len(W), w.width)
                for w in self.writers
            ],
            dim=1,
        )
        for batch, h in zip(batches, self.kept, strict=True):
            written = nn.functional.linear(h, whole.to(h.dtype), bias.to(h.dtype))
            batch.x = self._passed_by(batch.x) + written
        self.kept.clear()


def refit_readers(model: PreTrainedModel, layout: Layout, edge: Edge, batches: Sequence[Batch],
                  dense: Sequence[Tensor], uncut: Stage, change: Change | None) -> None:  # fmt: skip
    """Let what reads the stream at the beginning of a stage make up for what the stream has become.

    A reader W takes the normed signal n' of the sliced stream where it took n of the dense one. It becomes
    W (D + Δᵀ), where Δ regresses n − D n' on n', all tokens alike, and D is the decode of the cut that the point has
    just had (``change``; else the identity). λ as in ``Follower``.
    """
    norm = model.get_submodule(f"{edge.stage}.norm")
    assert uncut.norm is not None
    D = None if change is None else change.decode[0].mT
    parts: tuple[Normal, Normal] | None = None
    sequences = 0
    for batch, x in zip(batches, dense, strict=True):
        h, goal = norm(batch.x).float(), uncut.norm(x).float()
        if parts is None:
            shape = h.shape[-1], goal.shape[-1]
            parts = Normal.empty(*shape, h.device), Normal.empty(*shape, h.device)
        target = goal - (h if D is None else h @ D.to(h))
        for part, chosen in zip(parts, halves(sequences, len(x)), strict=True):
            if chosen.any():
                real = None if batch.mask is None else batch.mask[chosen]
                rows = real_tokens(h[chosen], real)
                part.add(rows, real_tokens(target[chosen], real), torch.ones_like(rows[:, :1]))
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


def halves(first: int, count: int) -> tuple[Tensor, Tensor]:
    """Which of ``count`` sequences from number ``first`` fit, and which are held out to choose the shrinkage."""
    held = torch.arange(first, first + count) % HELD_OUT == HELD_OUT - 1
    return ~held, held


def _writers(stage: Stage) -> Iterator[tuple[str, nn.Linear]]:
    for branch, name in (("attention", "out"), ("mlp", "down")):
        linear = stage.linears().get(name)
        if linear is not None:
            assert isinstance(linear, nn.Linear)  # a plan refuses to refit one of two factors
            yield f"{branch}.{name}", linear


def _cut(T: Tensor, dim: int, w: Writer, changes: Mapping[str, Change]) -> Tensor:
    """Features before a cut → features after it, along one axis."""
    for axis, change in along(w.axis, changes):
        T = contract(T, dim, replace(axis, role=Role.WRITE), change)
    return T


def _uncut(W: Tensor, w: Writer, changes: Mapping[str, Change]) -> Tensor:
    """A weight that reads features after a cut → the one that does the same to features before it."""
    for axis, change in reversed(along(w.axis, changes)):
        back = Change(change.encode.mT, change.encode.mT)
        W = contract(W, 1, replace(axis, role=Role.WRITE), back)
    return W


def best_shrinkage(train: Normal, held: Normal, choices: Sequence[float] = SHRINKAGE) -> float | None:
    """The shrinkage whose solution on ``train`` loses least on ``held``; None where changing nothing is better."""
    train, held = train.single(), held.single()  # enough to rank them
    loss, best = min((held.loss(train.solve(s)), s) for s in choices)
    return best if loss < 0 else None
