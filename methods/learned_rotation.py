"""Joint method `learned_rotation`: turned by gradient descent towards what loses least behind the cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from invariance.calibrate.statistic import Statistic
from invariance.core.change import Basis, Change
from invariance.core.dense import Dense
from invariance.core.group import Group
from invariance.core.space import Space
from invariance.method.interfaces import Joint
from invariance.method.joint import Scene

KEPT = 4  # windows on which the start and what was learned are compared


@dataclass(frozen=True)
class LearnedRotation(Joint, name="learned_rotation"):
    """Principal axes, turned by gradient descent on the Stiefel manifold to lose least once the space is cut.

    The loss is that of the dense model with x replaced by Q_k Q_kᵀ x on all spaces of the step at once, k their width: the KL
    from the dense model's predictions, or the text's cross-entropy, on one calibration window after another. It sees
    nothing but the span of Q_k, so Q = Q₀ (I + A/2)⁻¹ (I − A/2), Cayley's map of A = [0 −Bᵀ; B 0], B of (d − k) × k; Adam
    descends on B, from 0, its rate falling to 0 by a cosine. What is learned is taken where it is better than the start
    on calibration windows. Energies are those of PCA, within what stays and within what goes.

    Source: Li, Fuxin, Todorovic 2020, arXiv:2002.01113 (Cayley's map and Adam on the Stiefel manifold); Liu et al. 2024,
    arXiv:2405.16406 (rotations of language models so learned, for quantisation).
    """

    steps: int = 100
    learning_rate: float = 0.001
    batch: int = 1  # windows of a step
    loss: Literal["kl", "text"] = "kl"
    of: Literal["raw", "normed"] = "normed"  # of which moments the start has the principal axes
    produces = Group.ORTHOGONAL
    kinds = frozenset({"residual", "vo"})
    nested = True
    needs_widths = True

    def __post_init__(self) -> None:
        if self.steps < 0 or self.batch < 1 or not self.learning_rate > 0:
            raise ValueError("steps must be 0 or more, batch 1 or more, learning_rate above 0")

    @property
    def needs(self) -> frozenset[Statistic]:
        return frozenset({Statistic.RAW, Statistic(self.of)})

    def fit(self, scene: Scene) -> Mapping[str, Basis]:
        assert scene.widths is not None
        second = {name: self._second(space, scene) for name, space in scene.spaces.items()}
        start = {name: torch.linalg.eigh(C)[1].flip(-1) for name, C in second.items()}
        turned = self._descend(scene, start)
        return {name: _ordered(Q, second[name], scene.widths[name]) for name, Q in turned.items()}

    def _second(self, space: Space, scene: Scene) -> Float64[Tensor, "c d d"]:
        of = self.of if space.kind == "residual" else Statistic.RAW
        return scene.moments.second(space, of)

    def _descend(self, scene: Scene, start: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        cut = {
            n: scene.widths[n]
            for n in start
            if scene.widths and scene.widths[n] < start[n].shape[-1]
        }
        B = {n: self._flat(start[n], k, scene) for n, k in cut.items()}
        if not B or not self.steps:
            return start
        base = {n: start[n].to(B[n]) for n in cut}
        descent = torch.optim.Adam(B.values(), lr=self.learning_rate)
        slower = torch.optim.lr_scheduler.CosineAnnealingLR(descent, self.steps)
        for _, ids in zip(range(self.steps), self._windows(scene), strict=False):
            with torch.enable_grad():
                self._loss(scene, ids, {n: _cayley(base[n], B[n], cut[n]) for n in cut}).backward()
            descent.step()
            slower.step()
            descent.zero_grad()
        with torch.no_grad():
            learned = {n: _cayley(base[n], B[n], cut[n]) for n in cut}
            ids = scene.tokens.ids[:KEPT]
            before = self._loss(scene, ids, {n: base[n][..., : cut[n]] for n in cut})
            if not self._loss(scene, ids, learned) < before:
                return start
            exact = {n: _turn(B[n].detach().double().cpu()) for n in cut}
        return {n: Q @ exact[n] if n in exact else Q for n, Q in start.items()}

    def _flat(self, Q: Tensor, k: int, scene: Scene) -> Tensor:
        c, d, _ = Q.shape
        return torch.zeros(c, d - k, k, device=scene.model.device, requires_grad=True)

    def _loss(self, scene: Scene, ids: Tensor, kept: Mapping[str, Tensor]) -> Tensor:
        through = {n: _projection(scene.spaces[n], Q) for n, Q in kept.items()}
        return (scene.loss if self.loss == "text" else scene.divergence)(ids, through)

    def _windows(self, scene: Scene) -> Iterator[Tensor]:
        """Batches of windows, in turn."""
        while True:
            yield from scene.tokens.ids.split(self.batch)


def _projection(space: Space, Q: Float[Tensor, "c d k"]) -> Callable[[Tensor], Tensor]:
    kept = Change(Dense(Q), Dense(Q))
    return lambda x: kept.read(space, x)


def _turn(B: Float[Tensor, "c m k"]) -> Float[Tensor, "c d d"]:
    """(I + A/2)⁻¹ (I − A/2), orthogonal for every B."""
    c, m, k = B.shape
    A = torch.zeros(c, k + m, k + m, dtype=B.dtype, device=B.device)
    A = A.index_put(
        (torch.arange(c)[:, None, None], torch.arange(k, k + m)[:, None], torch.arange(k)), B
    )
    A = A - A.mT
    eye = torch.eye(k + m, dtype=B.dtype, device=B.device)
    return torch.linalg.solve(eye + A / 2, eye - A / 2)


def _cayley(Q: Float[Tensor, "c d d"], B: Float[Tensor, "c m k"], k: int) -> Float[Tensor, "c d k"]:
    """The first k columns of Q turned by B."""
    return Q @ _turn(B)[..., :k]


def _ordered(Q: Float64[Tensor, "c d d"], C: Float64[Tensor, "c d d"], k: int) -> Basis:
    """The same two spans, each in its principal axes."""
    parts = []
    for X in (Q[..., :k], Q[..., k:]):
        energy, axes = torch.linalg.eigh(X.mT @ C @ X)
        parts.append((X @ axes.flip(-1), energy.flip(-1).clamp_min(0)))
    (kept, high), (gone, low) = parts
    return Basis(torch.cat((kept, gone), -1), torch.cat((high, low), -1))
