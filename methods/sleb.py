"""Selector `sleb`: the blocks that the model misses least go, one by one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float64
from torch import Tensor

from invariance.core.space import Space
from invariance.method.budget import Bill, Predicted
from invariance.method.interfaces import Selector

from ._depth import candidates, check, drop


@dataclass(frozen=True)
class SLEB(Selector, name="sleb"):
    """Let blocks go one by one, each time the one without which the held-out loss is least; all others stay whole.

    The loss is that of the model without the blocks that went before, so that blocks which stand in for each other do
    not both go. ``blocks`` of them go, or with null as many as the budget asks for: n of N blocks cost
    n (2N - n + 1) / 2 + 1 evaluations. Takes `spaces: [heads, mlp]` and `widths: {min: 0}`. Where `blocks` is given, a later
    step may cut what stays.

    Source: Song et al. 2024 (SLEB), arXiv:2402.09025, algorithm 1 with its third metric (the loss of the model as it
    is cut so far).
    """

    blocks: int | None = None  # how many go; null for as many as the budget asks for
    depth = True
    measures = True

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
        assert cost.loss is not None
        loss, spaces = cost.loss, candidates(cost)

        def least(widths: dict[Space, int], left: list[int]) -> int:
            return min(left, key=lambda block: loss({**widths, **dict.fromkeys(spaces[block], 0)}))

        widths = drop(cost, self.blocks, budget, least)
        return Predicted(widths, loss(widths) - loss({}))
