"""Gains and biases of norms folded into the readers behind them, as the trace found them: no declaration."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from invariance.core.errors import InputError

from .analysis import Derived
from .arrays import rows_of


def fold(weights: Mapping[str, Tensor], derived: Derived) -> int:
    """In place: readers × gain, biases ÷ gain, the gain itself becomes 1. The number of gains folded.

    A norm's output γ x + β is γ (x + β/γ), so once γ has moved on, the bias is a writer like any other.
    """
    gains = {
        name: (weights[name].detach().double() + offset).flatten().clone()
        for name, offset in derived.gains.items()
        if name not in derived.unfolded
    }
    for (name, dim), parts in derived.folded_rows.items():
        rows, put = rows_of(weights[name], derived.axes[(name, dim)])
        rows = rows.clone()
        for gain, power, positions, indices in parts:
            if gain not in gains:
                continue
            factors = gains[gain][indices]
            if power < 0 and bool((factors == 0).any()):
                raise InputError(
                    f"{gain}: an element is 0, and the bias {name} beside it would be divided by it. "
                    "Set that bias element to 0 and the gain to 1, with its readers' columns at 0"
                )
            rows[positions] *= (factors**power)[:, None].to(rows.dtype)
        put(rows)
    for name in gains:
        weights[name].data.fill_(1.0 - derived.gains[name])
    return len(gains)
