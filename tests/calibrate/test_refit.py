"""The regressions by which a sliced model follows the dense one: what they solve, and how their shrinkage is chosen."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from invariance.calibrate.refit import (
    HELD_OUT,
    MIXES,
    SHRINKAGE,
    Normal,
    best_shrinkage,
    gather,
    spans,
)
from invariance.model.verify import relative_error, tolerance

K, D = 24, 2 * MIXES
seeds = st.integers(0, 9999)


def drawn(seed: int, n: int, signal: float) -> tuple[Tensor, Tensor]:
    """Features and targets of n tokens, of which a linear map explains as much as ``signal`` says."""
    g = torch.Generator().manual_seed(seed)
    h = torch.randn(n, K, generator=g) * torch.linspace(1, 0.05, K)
    truth = torch.randn(K, D, generator=torch.Generator().manual_seed(1))
    return h, signal * h @ truth + torch.randn(n, D, generator=g)


def close(one: Tensor, other: Tensor) -> bool:
    return relative_error(one, other) < tolerance(torch.float32, 0)


def equations(h: Tensor, t: Tensor, w: Tensor | None = None) -> Normal:
    found = Normal.empty(K, D, h.device)
    found.add(h, t, w)
    return found


@given(seed=seeds, shrinkage=st.sampled_from(SHRINKAGE))
def test_the_solution_is_the_least_of_what_it_minimises(seed: int, shrinkage: float) -> None:
    h, t = drawn(seed, 200, 1.0)
    w = torch.rand(200, 1, generator=torch.Generator().manual_seed(seed))
    found = equations(h, t, w)
    delta = found.solve(shrinkage).requires_grad_()
    weight = shrinkage * found.H.diagonal().mean()
    objective = (w * (t - h.double() @ delta).square()).sum() + weight * delta.square().sum()
    (gradient,) = torch.autograd.grad(objective, delta)
    scale = (h.double().mT @ (w * t).double()).norm()
    assert gradient.norm() < 1e-4 * scale  # sums over 200 tokens in float32
    (control,) = torch.autograd.grad(
        (t - h.double() @ delta).square().sum() + weight * delta.square().sum(), delta
    )
    assert control.norm() > 1e-2 * scale  # not of tokens that all count alike


@given(seed=seeds, signal=st.sampled_from([0.3, 1.0, 3.0]), n=st.sampled_from([30, 100, 400]))
def test_mixes_of_the_targets_choose_a_shrinkage_as_good_as_all_of_them(
    seed: int, signal: float, n: int
) -> None:
    train, held = equations(*drawn(seed, n, signal)), equations(*drawn(seed + 10_000, 400, signal))
    losses = {s: held.loss(train.solve(s)) for s in SHRINKAGE}
    chosen = best_shrinkage(train, held)
    span = max(losses.values()) - min(losses.values())
    assert chosen is not None
    assert losses[chosen] <= min(losses.values()) + 0.2 * span


@pytest.mark.parametrize("seed", range(5))
def test_where_nothing_can_be_foretold_nothing_changes(seed: int) -> None:
    noise = equations(*drawn(seed, 30, 0.0)), equations(*drawn(seed + 10_000, 4000, 0.0))
    assert best_shrinkage(*noise, choices=(1e-2,)) is None
    signal = equations(*drawn(seed, 30, 3.0)), equations(*drawn(seed + 10_000, 4000, 3.0))
    assert best_shrinkage(*signal, choices=(1e-2,)) == 1e-2


@given(first=st.integers(0, 9), count=st.integers(1, 12))
def test_one_sequence_in_so_many_is_held_out_wherever_a_batch_begins(
    first: int, count: int
) -> None:
    found = [
        (held, i) for held, rows in spans(first, count) for i in range(first, first + count)[rows]
    ]
    assert found == [(i // 2 % HELD_OUT == 0, i) for i in range(first, first + count)]


def test_batches_and_padding_make_no_difference() -> None:
    h, t = (x.unflatten(0, (8, 6)) for x in drawn(0, 48, 1.0))
    mask = torch.ones(8, 6, dtype=torch.bool)
    mask[3, 4:] = mask[5, 2:] = False
    whole = gather(None, 0, mask, h, t)
    parts = None
    for first in (0, 3, 6):
        rows = slice(first, first + 3)
        parts = gather(parts, first, mask[rows], h[rows], t[rows])
    assert parts is not None
    for one, other in zip(whole, parts, strict=True):
        assert one.n == other.n and close(one.H, other.H) and close(one.G, other.G)
    assert sum(n.n for n in whole) == int(mask.sum())
    assert not close(gather(None, 0, None, h, t)[0].H, whole[0].H)  # the control: padding counted
