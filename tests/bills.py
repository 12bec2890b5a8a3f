"""Three spaces at a price, bills of their widths, and every choice of widths that fits."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from hypothesis import strategies as st
from invariance.methods import _spend
from torch import Tensor

from invariance.core.group import Group
from invariance.core.space import Space
from invariance.method.budget import Bill
from invariance.method.interfaces import Selector

SPACES = [
    Space("mlp.0", "mlp", 12, Group.MONOMIAL),
    Space("mlp.1", "mlp", 9, Group.MONOMIAL),
    Space("vo.0", "vo", 6, Group.INVERTIBLE, 2),
]
PRICE = {"mlp": 3, "vo": 8}
seeds = st.integers(0, 9999)


def additive(widths: Mapping[Space, int]) -> int:
    return 50 + sum(PRICE[s.kind] * widths.get(s, s.dim) for s in SPACES)


def pooled(widths: Mapping[Space, int]) -> int:
    """A second resource, that the last space alone spends."""
    return 2 * widths.get(SPACES[2], SPACES[2].dim)


def bill(share: float, cost: Any = additive, **options: Any) -> Bill:
    allowed = {s: tuple(range(1, s.dim + 1)) for s in SPACES}
    return Bill({"parameters": cost}, {"parameters": int(share * cost({}))}, allowed, **options)


def spectra(seed: int) -> dict[Space, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        s: torch.rand(s.copies, s.dim, generator=g, dtype=torch.float64).pow(3).sort(-1, True)[0]
        for s in SPACES
    }


def choices(cost: Bill) -> Iterator[dict[Space, int]]:
    """Every choice of widths that fits."""
    for ks in itertools.product(*cost.widths.values()):
        widths = dict(zip(cost.widths, ks, strict=True))
        assert cost.limit is not None
        if cost(widths) <= cost.limit:
            yield widths


def spend(selector: Selector, seed: int, cost: Bill) -> Mapping[Space, int]:
    return selector.allocate(spectra(seed), cost, cost.limit)


def total(curves: _spend.Curves, widths: Mapping[Space, int]) -> float:
    return sum(curves[s][k] for s, k in widths.items())
