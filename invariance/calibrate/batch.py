"""One batch of tokens on its way through the blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..model.axes import Edge
from ..model.modules import Stage

Left = tuple[Tensor, Tensor]
"""What leaves a stage, and what its writers give: the same, or where a norm stands behind them, what they hand to it."""


@dataclass
class Batch:
    """One batch on its way: the stream (B, T, width) and what each block is called with beside it."""

    x: Tensor
    contexts: list[dict[str, Any]]
    mask: Tensor | None

    def through(self, stage: Stage, edge: Edge) -> Tensor:
        """The stream behind a stage, which stands on that edge."""
        return stage(self.x, **self.contexts[edge.block])

    def left(self, x: Tensor, stage: Stage, edge: Edge) -> Left:
        """The same of another stream, in this batch's place, and what is written there."""
        written = stage.write(x, **self.contexts[edge.block])
        behind = stage.land(x, written)
        return behind, written[0] if edge.post and written else behind
