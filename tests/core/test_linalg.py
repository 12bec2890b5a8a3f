"""Singular values where the fast algorithm gives up; inverses and solutions in place."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import seeds
from torch import Tensor

from invariance.core.linalg import ROWS, cholesky_, inverse_, part_, reorder_, solve_, svd
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


@given(n=st.integers(1, 1300), rhs=st.integers(1, 4), seed=seeds)
@settings(max_examples=10)
def test_in_place_of_a_matrix_stand_its_inverse_its_factor_and_the_solution(n, rhs, seed):
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(2, n, n, generator=g, dtype=torch.float64)
    M = X @ X.mT / n + torch.eye(n)
    B = torch.randn(2, rhs, n, generator=g, dtype=torch.float64)
    for change, expected in (
        (inverse_, torch.linalg.inv(M)),
        (cholesky_, torch.linalg.cholesky(M)),
    ):
        there = M.clone()
        found = change(there)
        assert found.data_ptr() == there.data_ptr()
        torch.testing.assert_close(found, expected)
    there = B.clone()
    found = solve_(M.clone(), there)
    assert found.data_ptr() == there.data_ptr()
    torch.testing.assert_close(found, torch.linalg.solve(M, B.mT).mT)


@pytest.mark.parametrize("change", [inverse_, cholesky_, lambda M: solve_(M, torch.ones(1, 1, 3))])
def test_a_matrix_that_is_not_positive_definite_is_refused(change):
    with pytest.raises(torch.linalg.LinAlgError, match="not positive definite"):
        change(torch.diag(torch.tensor([1.0, -1.0, 2.0]).double())[None])


@given(n=st.sampled_from([1, 2, 7, ROWS + 3]), seed=seeds)
@settings(max_examples=20)
def test_rows_and_columns_are_chosen_and_ordered_in_place(n, seed):
    g = torch.Generator().manual_seed(seed)
    M, order = torch.randn(n, n, generator=g, dtype=torch.float64), torch.randperm(n, generator=g)
    there = M.clone()
    assert reorder_(there, order) is there and there.equal(M[order][:, order])
    kept = order[: 1 + n // 2].sort()[0]
    there = M.clone()
    found = part_(there, kept)
    assert found.data_ptr() == there.data_ptr() and found.equal(M[kept][:, kept])
