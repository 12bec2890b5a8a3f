"""Roundings against their closed forms, written naively here; what they store; what a model with them computes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from invariance.methods.awq import AWQ
from invariance.methods.gptq import GPTQ
from invariance.methods.nearest import Nearest
from invariance.methods.sparsegpt import SparseGPT
from invariance.methods.wanda import Wanda
from tiny import seeds

from invariance.method.rounding import Grid

N, M = 5, 24


def drawn(seed: int, m: int = M, spread: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and the second moment of inputs that hang together and differ in size."""
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(N, m, generator=g)
    X = torch.randn(4 * m, m, generator=g) @ torch.randn(m, m, generator=g)
    X = X * torch.logspace(-spread, spread, m)[torch.randperm(m, generator=g)]
    return W, X.mT @ X / len(X)


def loss(W: torch.Tensor, values: torch.Tensor, C: torch.Tensor) -> float:
    """E‖W x − Ŵ x‖²."""
    error = (values - W).double()
    return float(((error @ C.double()) * error).sum())


def eliminated(W, C, ridge, width, decide):
    """The definition: each column is decided as the regression on those in front of it has it, H_RR solved anew."""
    W, H = W.double().numpy(), C.double().numpy().copy()
    H += ridge * H.diagonal().mean() * np.eye(len(H))
    made = W.copy()

    def wanted(first: int, here: slice) -> np.ndarray:
        """The columns ``here`` once those before ``first`` are fixed: W_R − (Ŵ_F − W_F) H_FR H_RR⁻¹."""
        F, R = np.arange(first), np.arange(first, W.shape[1])
        moved = (made[:, F] - W[:, F]) @ H[np.ix_(F, R)] @ np.linalg.inv(H[np.ix_(R, R)])
        return (W[:, R] - moved)[:, here.start - first : here.stop - first]

    for i in range(0, W.shape[1], width):
        here = slice(i, min(i + width, W.shape[1]))
        # 1 / U_jj² is the Schur complement of the columns behind j: what is left of H_jj.
        left = np.array([1 / np.linalg.inv(H[j:, j:])[0, 0] for j in range(here.start, here.stop)])
        rule = decide(wanted(i, here), left)
        for j in range(here.start, here.stop):
            made[:, j] = rule(j - i, wanted(j, slice(j, j + 1))[:, 0])
    return made


def to_grid(block: np.ndarray, bits: int):
    top = 2 ** (bits - 1)
    s = np.maximum(block.max(1) / (top - 1), block.min(1) / -top)
    s = torch.tensor(s).float().bfloat16().double().numpy()
    return lambda j, w: np.clip(np.round(w / s), -top, top - 1) * s


@given(seed=seeds, bits=st.integers(2, 5), group=st.sampled_from([4, 8, 24]))
def test_gptq_is_column_by_column_elimination(seed: int, bits: int, group: int) -> None:
    W, C = drawn(seed)
    found = GPTQ().round(W.double(), C, Grid(bits, group)).values
    there = eliminated(W, C, 0.01, group, lambda block, _: to_grid(block, bits))
    assert np.allclose(found.numpy(), there, atol=1e-8)


def test_gptq_stores_what_nearest_stores_and_loses_less() -> None:
    worse = 0
    for seed in range(20):
        W, C = drawn(seed)
        grid = Grid(3, 8)
        fed, plain = GPTQ().round(W, C, grid), Nearest().round(W, None, grid)
        s = fed.scales.repeat_interleave(8, 1)
        integers = fed.values / s
        assert torch.allclose(integers, integers.round(), atol=1e-4)
        assert integers.round().min() >= -4 and integers.round().max() <= 3
        worse += loss(W, fed.values, C) > loss(W, plain.values, C)
        assert GPTQ().stored_bits(N, M, grid, 16) == Nearest().stored_bits(N, M, grid, 16)
    assert worse == 0
    assert Nearest().stored_bits(N, M, Grid(3, 8), 16) == N * M * 3 + N * M // 8 * 16


def test_without_correlations_gptq_is_nearest() -> None:
    W, _ = drawn(0)
    fed = GPTQ().round(W, torch.diag(torch.logspace(-2, 2, M)), Grid(4, 8))
    assert torch.allclose(fed.values, Nearest().round(W, None, Grid(4, 8)).values, atol=1e-6)


@given(seed=seeds, keep=st.sampled_from([0.25, 0.5, 0.75]), block=st.sampled_from([4, 8, 24]))
def test_sparsegpt_masks_what_costs_least_and_refits_what_is_behind(
    seed: int, keep: float, block: int
) -> None:
    W, C = drawn(seed)
    found = SparseGPT(keep=keep, block=block).round(W.double(), C, Grid(4, 8)).values

    def decide(wanted, left):
        scores = (wanted**2 * left).ravel()
        mask = np.zeros(scores.size, dtype=bool)
        mask[np.argsort(-scores, kind="stable")[: max(round(keep * scores.size), 1)]] = True
        mask = mask.reshape(wanted.shape)
        return lambda j, w: w * mask[:, j]

    assert np.allclose(found.numpy(), eliminated(W, C, 0.01, block, decide), atol=1e-8)
    assert (found != 0).sum() == sum(
        max(round(keep * N * min(block, M - i)), 1) for i in range(0, M, block)
    )


def test_wanda_keeps_the_largest_weight_times_input_of_each_row() -> None:
    W, C = drawn(1)
    found = Wanda(keep=0.25).round(W, C, Grid(4, 8)).values
    scores = W.abs().numpy() * np.sqrt(np.diag(C.numpy()))
    for row in range(N):
        kept = sorted(np.argsort(-scores[row])[:6])
        assert found[row].nonzero()[:, 0].tolist() == kept
        assert torch.equal(found[row, kept], W[row, kept])


@pytest.mark.parametrize("rounding", [Wanda(pattern="2:4"), SparseGPT(pattern="2:4", block=8)])
def test_two_of_four_neighbours_stay(rounding) -> None:
    W, C = drawn(2)
    found = rounding.round(W, C, Grid(4, 8)).values
    assert ((found.unflatten(1, (-1, 4)) != 0).sum(-1) == 2).all()


def test_sparsegpt_loses_less_than_wanda_and_a_mask_takes_a_bit_a_place() -> None:
    lost = np.zeros((10, 2))
    for seed in range(10):
        W, C = drawn(seed, spread=0.0)  # channels alike, but for what they share
        for n, how in enumerate((SparseGPT(), Wanda())):
            lost[seed, n] = loss(W, how.round(W, C, Grid(4, 8)).values, C)
    refit, plain = np.log(lost).mean(0)
    assert refit < plain
    for rounding in (Wanda(keep=0.25), SparseGPT(keep=0.25)):
        assert rounding.stored_bits(N, M, Grid(4, 8), 16) == N * M + 16 * N * M // 4


def test_awq_scales_are_the_best_of_the_grid_and_no_worse_than_none() -> None:
    grid = Grid(3, 8)
    better = 0
    for seed in range(10):
        W, C = drawn(seed)
        s = AWQ().channel_scales([W[:3], W[3:]], C, grid).double()

        def lost(s: torch.Tensor, W: torch.Tensor = W, C: torch.Tensor = C) -> float:
            scaled = W.double() * s
            return loss(W, grid.nearest(scaled, grid.scales(scaled)) / s, C)

        power = C.diagonal().double()
        tried = [power ** (n / 40) for n in range(21)]
        tried = [(t / (t.max() * t.min()).sqrt()).clamp_min(1e-4) for t in tried]
        assert lost(s) == pytest.approx(min(map(lost, tried)), rel=1e-3)
        assert lost(s) <= lost(torch.ones(M)) * (1 + 1e-3)
        better += lost(s) < 0.9 * lost(torch.ones(M))
    assert better >= 5


def test_awq_clips_a_group_where_the_weighted_error_is_least() -> None:
    W, C = drawn(3)
    grid = Grid(3, 8)
    found = AWQ().round(W, C, grid)
    weight = C.diagonal()

    def lost(values: torch.Tensor) -> torch.Tensor:
        return ((values - W).square() * weight).unflatten(1, (-1, 8)).sum(-1)

    whole = grid.scales(W)
    each = [lost(grid.nearest(W, (whole * (1 - n / 20)).bfloat16().float())) for n in range(10)]
    assert torch.allclose(lost(found.values), torch.stack(each).amin(0))
    assert (lost(found.values) <= lost(grid.nearest(W, whole))).all()
    assert (found.scales < whole).any()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: GPTQ(ridge=0.0), "ridge"),
        (lambda: Wanda(keep=1.0), "keep"),
        (lambda: SparseGPT(keep=0.25, pattern="2:4"), "2:4"),
        (lambda: SparseGPT(block=6), "block"),
        (lambda: AWQ(steps=0), "steps"),
    ],
)
def test_options_that_cannot_be_are_refused(make, says) -> None:
    with pytest.raises(ValueError, match=says):
        make()
