"""Gains and biases of norms folded into the readers behind them, as the trace found them: no declaration."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from invariance.core.errors import InputError

from .analysis import Derived
from .arrays import unique


def fold(weights: Mapping[str, Tensor], derived: Derived) -> int:
    """In place: readers × gain, biases ÷ gain, the gain itself becomes 1. The number of gains folded.

    A norm's output γ x + β is γ (x + β/γ), so once γ has moved on, the bias is a writer like any other.
    """
    gains = {
        name: (weights[name].detach().double() + offset).flatten().clone()
        for name, offset in derived.gains.items()
        if name not in derived.unfolded
    }
    for (name, _), field in derived.axes.items():
        ids = unique(field)
        factors = torch.ones(len(ids), dtype=torch.float64)
        for i, a in enumerate(ids.tolist()):
            into = derived.folds.get(a)
            if into is None or into.name not in gains:
                continue
            gain = float(gains[into.name][into.index])
            if gain == 0 and into.power < 0:
                raise InputError(
                    f"{into.name}: element {into.index} is 0, and the bias {name} beside it would be divided by it. "
                    "Set that bias element to what its readers see, or the gain to a small number"
                )
            factors[i] = gain**into.power
        if not bool((factors == 1).all()):
            weights[name].data.mul_(factors[torch.searchsorted(ids, field.contiguous())])
    for name in gains:
        weights[name].data.fill_(1.0 - derived.gains[name])
    return len(gains)
