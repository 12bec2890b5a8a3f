"""Statistics: what calibration can measure of the signal on a space."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

from ..core.space import Space


class Statistic(Enum):
    """What a method asks of a space; only what some method of the recipe needs is measured."""

    RAW = "raw"  # E[x xᵀ] of the signal as it is
    NORMED = "normed"  # E[x xᵀ] of what the norm gives (its gain folded away), as readers of the residual stream see it
    WEIGHTED = "weighted"  # E[w x xᵀ] / E[w], w = 1/mean(y²) of the stream y behind the stage, by which the next norm divides
    SEEN = "seen"  # as the readers see it: NORMED on the stream, WEIGHTED where what is read is added to it, else RAW
    MEAN = "mean"  # E[x] of the signal as it is
    FISHER = "fisher"  # E[g gᵀ], g the gradient of a sampled label's log-likelihood: ½ E[eᵀFe] nats a token for errors e
    TAYLOR = "taylor"  # E[m mᵀ], m = Σ q ∘ g over the queries of a KV head: dropping dims S costs ½ Σ_S of it, in nats
    QUERIES = (
        "queries"  # E[q qᵀ] of the queries that meet a KV head's keys, before positions turn them
    )
    READERS = "readers"  # Σ WᵀW over the weights that read the space, heads that share a copy averaged; needs no tokens
    EXPERTS = "experts"  # on the diagonal, of each expert E[g‖f‖] over the tokens that chose it, g the router's weight
    COSINE = "cosine"  # mean cosine of the stream into a block and out of it; for selectors, in ``Bill.influence``

    def on(self, space: Space) -> Statistic:
        """Which statistic is measured where this one is asked of a space."""
        if self is not Statistic.SEEN:
            return self
        added = Statistic.WEIGHTED if space.kind in ("mlp", "vo", "heads") else Statistic.RAW
        return Statistic.NORMED if space.kind == "residual" else added


Wanted = Mapping[str, frozenset[Statistic]]
"""Which statistics to measure of which spaces, by name."""


def together(*asked: Wanted) -> Wanted:
    """What any of several asks for."""
    return {n: frozenset().union(*(a.get(n, frozenset()) for a in asked)) for a in asked for n in a}
