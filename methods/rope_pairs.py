"""Rotator `rope_pairs`: the frequency pairs of rotary positions, those first that the scores or the output need most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float64, Int
from torch import Tensor

from invariance.calibrate.moments import Moments
from invariance.calibrate.statistic import Statistic
from invariance.core.change import Basis
from invariance.core.group import Group
from invariance.core.pick import Pick
from invariance.core.space import Space
from invariance.method.interfaces import NATS, Rotator

Choice = tuple[Int[Tensor, "c h"], Float64[Tensor, "c h"], Float64[Tensor, "c s"]]
"""The order of the pairs, what each dim of a pair is worth in it, and what each dim is that positions spare."""


@dataclass(frozen=True)
class RopePairs(Rotator, name="rope_pairs"):
    """Frequency pairs of queries and keys by falling E‖q_pair‖²·E‖k_pair‖², their frequencies moving along.

    For independent queries and keys at random distance, a quarter of it is the mean square that each of a pair's two
    dims adds to the score. Lengths of pairs do not change when positions turn them, so the moments before will do. The
    query heads that share a KV head share its choice; they count together. Dims that positions spare stay, and count
    as no less than the best pair. With ``per: model`` every layer keeps the same pairs, so that `longrope` factors can
    hold them in a stock config.

    ``metric: fisher`` lets that pair go next without which the output loses least, in nats a token by the statistic
    ``taylor``, those before it gone: what pairs do together counts. Energies are what each adds to the loss.

    Source: Lin et al. 2024 (MoDeGPT), arXiv:2408.09632, algorithm 2: the score ‖C_q^½ e‖·‖C_k^½ e‖, squared. Theis et al.
    2018, arXiv:1801.05787, equation 8, for the Fisher of what is left out.
    """

    per: Literal["head", "layer", "model"] = (
        "head"  # what gets a choice of its own: a KV head, a layer, the model
    )
    produces = Group.ROTARY
    kinds = frozenset({"qk"})
    metric: Literal["scores", "fisher"] = (
        "scores"  # what a pair is worth: its part of the scores, or nats
    )

    @property
    def needs(self) -> frozenset[Statistic]:
        return frozenset({Statistic.TAYLOR} if self.nats else {Statistic.RAW, Statistic.QUERIES})

    @property
    def unit(self) -> str:
        return NATS if self.metric == "fisher" else super().unit

    @property
    def nested(self) -> bool:  # type: ignore[override]
        return self.nats

    @property
    def shares_basis(self) -> bool:
        return self.per == "model"

    def fit(self, space: Space, moments: Moments) -> Basis:
        c, h, r = space.copies, space.rotary // 2, space.rotary
        order, pairs, spared = (self._by_loss if self.nats else self._by_score)(space, moments)
        index = torch.cat((order, order + h, torch.arange(r, space.dim).expand(c, -1)), 1)
        pairs = pairs.repeat_interleave(2, 1)
        best = torch.cat((pairs, spared), 1).amax(1, keepdim=True)
        return Basis(Pick(index, space.dim), torch.cat((best.expand(c, space.spared), pairs), 1))

    def _by_score(self, space: Space, moments: Moments) -> Choice:
        h, r = space.rotary // 2, space.rotary
        q, k = (moments.diagonal(space, s) for s in (Statistic.QUERIES, Statistic.RAW))
        score = (q[:, :h] + q[:, h:r]) * (k[:, :h] + k[:, h:r]) / 4
        if self.per != "head":
            score = score.mean(0, keepdim=True).expand_as(
                score
            )  # each of them has its part of the sum
        order = score.argsort(dim=-1, descending=True, stable=True)
        return order, score.gather(1, order), q[:, r:] * k[:, r:]

    def _by_loss(self, space: Space, moments: Moments) -> Choice:
        M = moments.second(space, Statistic.TAYLOR)
        h, r = space.rotary // 2, space.rotary
        pairs = rearrange(M[:, :r, :r], "c (a i) (b j) -> c a b i j", i=h, j=h).sum((1, 2))
        if self.per != "head":
            pairs = pairs.mean(0, keepdim=True).expand_as(pairs)
        order, loss = zip(*(last_first(P) for P in pairs), strict=True)
        spared = M.new_zeros(space.copies, space.spared)
        return torch.stack(order), torch.stack(loss) / 2, spared  # each dim has half of its pair's


def last_first(P: Float64[Tensor, "h h"]) -> tuple[Int[Tensor, " h"], Float64[Tensor, " h"]]:
    """The pairs, those that stay longest first, and what each adds to the loss ½ Σ P_ij over those gone.

    The next one to go adds least. A loss that falls again counts from where it passes what it was.
    """
    adds, gone, lost = P.diagonal() / 2, [], []
    for _ in range(len(P)):
        j = int(adds.argmin())
        gone.append(j)
        lost.append(adds[j])
        adds = adds + P[j]
        adds[j] = torch.inf
    total = torch.stack(lost).cumsum(0).clamp_min(0).cummax(0)[0]
    return torch.tensor(gone).flip(0), total.diff(prepend=total.new_zeros(1)).flip(0)
