"""Shortcuts of low rank: every basis of the stream is turned to follow the one before, and I − F Fᵀ joins the two."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float64
from torch import Tensor

from .change import Change, bridge
from .linalg import svd


def follow(source: Change, target: Change, rank: int, C: Float64[Tensor, "k k"]) -> Change:
    """The target turned within what it keeps so that its shortcut is I − F Fᵀ, and the best F of that rank.

    With S = D_sᵀ E_t = U Σ Vᵀ (k × k), the turn R = V Uᵀ gives S R = U Σ Uᵀ = I − U (I − Σ) Uᵀ: Σ are the cosines of the
    principal angles between the two subspaces. F = U √(I − Σ), of the columns whose lack adds most to the stream:
    (1 − σ)² uᵀ C u, with C the second moment of the stream in the source's basis. F is never of more than ``enough``.
    """
    U, cosines, Vh = svd(bridge(source, target))
    R = Vh.mT @ U.mT
    lost = (1 - cosines).clamp_min(0)  # a cosine may round to more than 1
    weight = lost.square() * (U * (C @ U)).sum(0)
    kept = weight.topk(min(rank, enough(source.encode.dim, source.width))).indices.sort().values
    F = U[:, kept] * lost[kept].sqrt()
    return Change(target.encode @ R[None], target.decode @ R[None], entry=F)


def enough(d: int, k: int) -> int:
    """The rank at which a shortcut is exact: two subspaces of k dims among d meet in 2k − d at least."""
    return min(k, d - k)


@dataclass
class Chain:
    """The bases of one stream in turn, each made to follow the one before where a shortcut of low rank joins them."""

    ranks: Mapping[str, int]  # point of the stream → rank of the shortcut that leads there
    before: tuple[Change, Float64[Tensor, "k k"]] | None = (
        None  # the basis before, with its second moment
    )

    def add(self, point: str, change: Change, C: Float64[Tensor, "d d"]) -> Change:
        """The change of the points from this one on, turned; C is their second moment before they are cut."""
        rank = self.ranks.get(point)
        if rank is not None and self.before is not None:
            source, seen = self.before
            change = follow(source, change, rank, seen)
        self.before = change, change.encode.contract(change.encode.contract(C), axis=0)
        return change
