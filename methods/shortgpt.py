"""Selector `shortgpt`: the blocks that change the stream least go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float64
from torch import Tensor

from invariance.calibrate.statistic import Statistic
from invariance.core.space import Space
from invariance.method.budget import Bill
from invariance.method.interfaces import Selector

from ._depth import candidates, check, drop


@dataclass(frozen=True)
class ShortGPT(Selector, name="shortgpt"):
    """Let the blocks of least influence go, with both their branches; all others stay whole.

    BI_i = 1 - E[cos(x_i, y_i)], x_i the stream into block i and y_i out of it, in the dense model. Blocks go by rising
    BI: ``blocks`` of them, or with null as many as the budget asks for. Takes `spaces: [heads, mlp]`
    (one of them alone lets that branch go) and `widths: {min: 0}`. Where `blocks` is given, a later step may cut what
    stays.

    Source: Men et al. 2024 (ShortGPT), arXiv:2403.03853, equation 1 and section 3.2.
    """

    blocks: int | None = None  # how many go; null for as many as the budget asks for
    depth = True
    needs = frozenset({Statistic.COSINE})

    def __post_init__(self) -> None:
        check(self.blocks)

    @property
    def needs_budget(self) -> bool:
        return self.blocks is None

    def allocate(
        self,
        spectra: Mapping[Space, Float64[Tensor, "c d"] | None],
        cost: Bill,
        budget: float | None,
    ) -> Mapping[Space, int]:
        assert cost.influence is not None
        influence = {block: cost.influence[spaces[0]] for block, spaces in candidates(cost).items()}
        return drop(cost, self.blocks, budget, lambda _, left: min(left, key=influence.__getitem__))
