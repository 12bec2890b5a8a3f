"""Rotator `smooth`: channels scaled so that what varies from channel to channel is shared between both sides."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from invariance.calibrate.moments import Moments
from invariance.calibrate.statistic import Statistic
from invariance.core.change import Basis
from invariance.core.group import Group
from invariance.core.pick import Pick
from invariance.core.space import Space
from invariance.method.interfaces import Rotator

from ._order import by_energy


@dataclass(frozen=True)
class Smooth(Rotator, name="smooth"):
    """Channels by falling energy, as `permute`, each scaled on the linear branch of a gated MLP, or under ReLU.

    Channel j is divided by s_j = RMS(x_j)^α / ‖W_j‖^(1−α), W_j its readers' column, which they take up; so x_j has the size
    (RMS(x_j)·‖W_j‖)^(1−α) and W_j that to the power α: with ``strength`` α = 0 all channels weigh alike with their
    readers, with 1 in the signal. Nothing that the network computes changes; what a rounding step loses on weights or
    signals does. Channels that never fire, or that nobody reads, keep their scale. The energy E[x_j²]·‖W_j‖² does not
    depend on α.

    Source: Xiao et al. 2022 (SmoothQuant), arXiv:2211.10438, equation 4, with RMS in place of the maximum; without data,
    the equalisation of Nagel et al. 2019, arXiv:1906.04721, section 4.1.
    """

    strength: float = 0.5  # α, from 0 to 1: how much of the channels' differences moves from the signal to the readers
    produces = Group.POSITIVE_MONOMIAL
    kinds = frozenset({"mlp"})
    needs = frozenset({Statistic.RAW, Statistic.READERS})

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1:
            raise ValueError("strength must be at least 0 and at most 1")

    def fit(self, space: Space, moments: Moments) -> Basis:
        signal = moments.diagonal(space).clamp_min(0).sqrt()
        readers = moments.diagonal(space, Statistic.READERS).sqrt()
        scale = signal**self.strength / readers ** (1 - self.strength)
        lives = (signal > 0) & (readers > 0)
        scale = torch.where(lives, scale, 1.0)
        middle = (
            scale.log().mean(-1, keepdim=True).exp()
        )  # far from it, nothing is left of a channel in low precision
        scale = scale.clamp(middle / LIMIT, middle * LIMIT)
        order = Pick.first(space.copies, space.dim).scaled(1 / scale)
        return by_energy(order, (signal * readers).square())


LIMIT = 1e4  # how far a scale may be from their geometric mean
