"""Sums of products: what is added where, in strips or at once."""

from __future__ import annotations

import pytest
import torch

from invariance.calibrate import outer
from invariance.calibrate.outer import add_outer


@pytest.mark.parametrize("large", [2**21, 1000], ids=["at once", "in strips"])
@pytest.mark.parametrize("width", [5, 300, 601])
def test_batches_are_added_to_the_sums_that_are_there(
    width: int, large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outer, "LARGE", large)
    generator = torch.Generator().manual_seed(width)
    batches = torch.randn(2, 3, 40, width, generator=generator, dtype=torch.float64)
    total = torch.zeros(3, width, width, dtype=torch.float64)
    for x in batches:
        add_outer(x, total)
    expected = sum(x.mT @ x for x in batches)
    assert torch.allclose(total, torch.as_tensor(expected), rtol=0, atol=40 * 100 * 2.3e-16)


def test_products_of_bfloat16_signals_are_exact() -> None:
    x = torch.randn(1, 8, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
    total = torch.zeros(1, 300, 300, dtype=torch.float64)
    add_outer(x, total)
    exact = x.double().mT @ x.double()
    assert (total - exact).abs().max() <= 8 * torch.finfo(torch.float32).eps * exact.abs().max()
    rounded = exact.bfloat16().double()  # what sums taken in bfloat16 would be off by, at least
    assert (rounded - exact).abs().max() > 100 * (total - exact).abs().max()
