"""Rotator `rope_pairs`: the frequency pairs of rotary positions, in order of what they add to the scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float64
from torch import Tensor

from invariance.interfaces import Rotator, Statistic
from invariance.moments import Moments
from invariance.space import Basis, Group, Space


@dataclass(frozen=True)
class RopePairs(Rotator, name="rope_pairs"):
    """Frequency pairs of queries and keys by falling E‖q_pair‖²·E‖k_pair‖², their frequencies moving along.

    For independent queries and keys at random distance, a quarter of it is the mean square that each of a pair's two
    dims adds to the score. Lengths of pairs do not change when positions turn them, so the moments before will do. The
    query heads that share a KV head share its choice; they count together. Dims that positions spare stay, and count
    as no less than the best pair. With ``per: model`` every layer keeps the same pairs, so that `longrope` factors can
    hold them in a stock config.

    Source: Lin et al. 2024 (MoDeGPT), arXiv:2408.09632, algorithm 2: the score ‖C_q^½ e‖·‖C_k^½ e‖, squared.
    """

    per: Literal["head", "layer", "model"] = (
        "head"  # what gets a choice of its own: a KV head, a layer, the model
    )
    produces = Group.ROTARY
    kinds = frozenset({"qk"})
    needs = frozenset({Statistic.RAW, Statistic.QUERIES})

    @property
    def joint(self) -> bool:
        return self.per == "model"

    def fit(self, space: Space, moments: Moments) -> Basis:
        c, h, r = space.copies, space.rotary // 2, space.rotary
        q, k = (
            moments.second(space, s).diagonal(dim1=-2, dim2=-1) for s in (Statistic.QUERIES, Statistic.RAW)
        )
        score = (q[:, :h] + q[:, h:r]) * (k[:, :h] + k[:, h:r]) / 4
        if self.per != "head":
            score = score.mean(0, keepdim=True).expand(c, h)  # each of them has its part of the sum
        order = score.argsort(dim=-1, descending=True, stable=True)
        i, copy = torch.arange(h), torch.arange(c)[:, None]
        A: Float64[Tensor, "c d d"] = torch.eye(space.dim, dtype=torch.float64).repeat(c, 1, 1)
        A[:, :r, :r] = 0
        A[copy, order, i] = A[copy, order + h, i + h] = 1
        pairs = score.gather(1, order).repeat_interleave(2, 1)
        best = torch.cat((pairs, q[:, r:] * k[:, r:]), 1).amax(1, keepdim=True)
        return Basis(A, torch.cat((best.expand(c, space.spared), pairs), 1))
