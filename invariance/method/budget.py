"""The budget: what widths cost in each resource, which widths are allowed, and how much of it may be spent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from math import ceil
from typing import TypeVar

from ..core.errors import InputError
from ..core.space import Space

Chosen = Mapping[Space, int]
S = TypeVar("S")
UNITS = {  # of amounts
    "parameters": "parameters",
    "flops": "FLOPs a token",
    "kv_cache": "KV numbers a token",
    "latency": "nanoseconds of latency",
}


class Predicted(dict[S, int]):
    """Widths with the loss that is predicted of them: nats per token beyond what the whole spaces lose."""

    def __init__(self, widths: Mapping[S, int], loss: float) -> None:
        super().__init__(widths)
        self.loss = loss


def spendable(share: float, dense: float) -> int:
    """What a share of an amount comes to, rounded down; the share as it is written, so that 0.7 of 10 is 7."""
    return int(Fraction(repr(share)) * Fraction(dense))


@dataclass(frozen=True)
class Bill:
    """What a choice of widths costs; ``bill(widths)`` is the amount to hold against ``limit``.

    ``amounts`` counts each resource that the recipe limits, ``limits`` says how much of it there is, ``dense`` how much
    the model spends as it comes. With one resource the bill is its amount, with several the largest share spent of any,
    and the limit is 1. Spaces left out of ``widths`` keep what they have. ``widths[space]`` are the widths that the
    recipe's constraints allow, ascending. ``loss`` measures a choice on held-out tokens (nats per token), for selectors
    that declare ``measures``; ``influence`` is 1 - E[cos(stream into, out of)] of each space's block, for those that
    need Statistic.COSINE. ``protected`` spaces stay whole because the recipe says so: their only width is that.
    """

    amounts: Mapping[str, Callable[[Chosen], float]]
    limits: Mapping[str, float]
    widths: Mapping[Space, tuple[int, ...]]
    loss: Callable[[Chosen], float] | None = None
    influence: Mapping[Space, float] | None = None
    dense: Mapping[str, float] = field(default_factory=dict)
    protected: frozenset[Space] = frozenset()

    def __call__(self, widths: Chosen) -> float:
        if len(self.amounts) == 1:
            (amount,) = self.amounts.values()
            return amount(widths)
        return max(self.amounts[r](widths) / self.limits[r] for r in self.amounts)

    @property
    def limit(self) -> float | None:
        """The most that the bill may come to; None where the recipe limits nothing."""
        if not self.limits:
            return None
        return next(iter(self.limits.values())) if len(self.limits) == 1 else 1.0

    @property
    def whole(self) -> dict[Space, int]:
        """Every space at its widest."""
        return {space: allowed[-1] for space, allowed in self.widths.items()}

    def rounded(self, space: Space, width: float) -> int:
        """The largest allowed width that is no more; the narrowest one where all are."""
        allowed = self.widths[space]
        return max((k for k in allowed if k <= width + 1e-9), default=allowed[0])

    def narrower(self, space: Space, k: int) -> int | None:
        """The next allowed width below k, if there is one."""
        return max((w for w in self.widths[space] if w < k), default=None)

    def check(self, narrowest: Chosen | None = None) -> None:
        """Raises InputError where even the narrowest widths cost too much, with the nearest budget that can be met."""
        narrowest = narrowest or {space: allowed[0] for space, allowed in self.widths.items()}
        least = {r: self.amounts[r](narrowest) for r in self.limits}
        short = [r for r, limit in self.limits.items() if least[r] > limit]
        if not short:
            return
        nearest = {r: ceil(1000 * least[r] / self.dense[r]) / 1000 for r in short}
        raised = ", ".join(f"{r}: {share:g}" for r, share in nearest.items())
        remedy = f"Raise it to `{raised}`, allow" if max(nearest.values()) <= 1 else "Allow"
        raise InputError(
            f"the budget of {' and '.join(f'{self.limits[r]:,.0f} {UNITS[r]}' for r in short)} cannot be met: these spaces at "
            f"their narrowest leave {' and '.join(f'{least[r]:,.0f}' for r in short)}. {remedy} narrower widths, or cut more "
            "spaces."
        )
