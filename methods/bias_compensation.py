"""Slicer `bias_compensation`: keep the first k directions, and the mean of the rest in the readers' biases."""

from __future__ import annotations

from dataclasses import dataclass

from invariance.calibrate.moments import Moments
from invariance.calibrate.statistic import Statistic
from invariance.core.change import Basis, Change
from invariance.core.space import Space
from invariance.method.interfaces import Slicer

from .truncate import Truncate


@dataclass(frozen=True)
class BiasCompensation(Slicer, name="bias_compensation"):
    """Keep the first k directions, and let the readers' biases make up for the mean of what is gone.

    As `truncate`, with the offset (I − D Eᵀ) E[x]: on an MLP, where E picks channels, the readers' biases get
    W·E[x] over the channels that go. Readers without a bias get one, so checkpoints of families without are not
    stock. The mean of a value head is that of all query heads which share it. On `heads`, the mean of all that the KV
    groups gave which go.

    Source: An et al. 2023 (FLAP), arXiv:2312.11983, its baseline bias compensation.
    """

    needs = frozenset({Statistic.MEAN})
    kinds = frozenset({"mlp", "vo", "heads"})
    offsets = True

    def cut(self, space: Space, basis: Basis, k: int, moments: Moments) -> Change:
        plain = Truncate().cut(space, basis, k, moments)
        if k == space.dim:
            return plain
        mean = moments.mean(space)
        left = mean - plain.read(space, mean.flatten()).view_as(mean)
        return Change(plain.encode, plain.decode, left)
