"""Singular values where the fast algorithm gives up."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from invariance.core.linalg import svd
from invariance.core.space import haar


def gives_up(*_: Tensor, **__: bool) -> Tensor:
    raise torch.linalg.LinAlgError("linalg.svd: The algorithm failed to converge")


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (2, 6, 6)])
def test_the_factors_are_those_of_the_fast_algorithm(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    M = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = torch.linalg.svdvals(M)
    fast = svd(M)
    monkeypatch.setattr(torch.linalg, "svd", gives_up)
    for U, sigma, Vt in (fast, svd(M)):
        assert torch.allclose((U * sigma.unsqueeze(-2)) @ Vt, M, atol=1e-12)
        assert torch.allclose(sigma, expected, atol=1e-12)
        eye = torch.eye(sigma.shape[-1], dtype=torch.float64)
        assert (U.mT @ U - eye).abs().max() < 1e-12 and (Vt @ Vt.mT - eye).abs().max() < 1e-12


def test_cosines_of_one_repeat_and_numbers_that_are_not_finite_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.linalg, "svd", gives_up)
    Q = haar(12, torch.Generator().manual_seed(1))
    _, cosines, _ = svd(Q[:, :9].mT @ Q[:, 1:10])
    assert (cosines[:8] - 1).abs().max() < 1e-12 and cosines[8] < 1e-12
    with pytest.raises(ValueError, match="infs or NaNs"):
        svd(torch.full((2, 2), torch.nan, dtype=torch.float64))
