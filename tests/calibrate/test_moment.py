"""Second moments by their blocks alone: the same numbers, and never the whole."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import seeds
from torch import Tensor

from invariance.calibrate.moment import Gram, Moment
from invariance.calibrate.moments import Moments
from invariance.calibrate.statistic import Statistic
from invariance.core.group import Group
from invariance.core.pick import Pick
from invariance.core.space import Space
from invariance.method.interfaces import find

F64 = torch.float64


def gram(copies: int, width: int, runs: int, metric: bool, seed: int) -> Gram:
    g = torch.Generator().manual_seed(seed)
    rows = [int(n) for n in torch.randint(1, 700, (2,), generator=g)]
    weights = [torch.randn(n, copies * runs * width, generator=g) for n in rows]
    squares = [torch.randn(n, n, generator=g, dtype=F64) for n in rows]
    metrics = [m @ m.mT if metric else None for m in squares]
    return Gram(copies, width, lambda: iter(zip(weights, metrics, strict=True)))


def plain(found: Gram) -> Tensor:
    """Σ Wᵀ M W, run by run."""
    total = torch.zeros(found.copies, found.width, found.width, dtype=F64)
    for W, M in found.weights():
        runs = W.double().unflatten(1, (found.copies, -1, found.width))
        for c in range(found.copies):
            for r in range(runs.shape[2]):
                X = runs[:, c, r]
                total[c] += (X.mT @ X if M is None else X.mT @ M @ X) / runs.shape[2]
    return total


@given(
    copies=st.integers(1, 2),
    directions=st.integers(1, 3),
    grain=st.integers(1, 3),
    runs=st.integers(1, 2),
    metric=st.booleans(),
    seed=seeds,
)
def test_blocks_are_those_of_the_whole(copies, directions, grain, runs, metric, seed):
    width = directions * grain
    one, other = (gram(copies, width, runs, metric, seed + n) for n in (0, 1))
    torch.testing.assert_close(one.mean, plain(one))
    both = one + other
    torch.testing.assert_close(both.mean, (plain(one) + plain(other)) / 2)
    for found in (both, Moment(both.total, 2)):
        whole = found.mean
        blocks = [whole[:, i : i + grain, i : i + grain] for i in range(0, width, grain)]
        torch.testing.assert_close(found.blocks(grain), torch.stack(blocks, 1))
        diagonal = whole.diagonal(dim1=-2, dim2=-1)
        torch.testing.assert_close(found.blocks(1).flatten(1), diagonal)
    torch.testing.assert_close(
        (both + Moment(one.total, 1)).mean, (plain(one) * 2 + plain(other)) / 3
    )
    X = Pick(torch.zeros(copies, 2, dtype=torch.int64), width)
    torch.testing.assert_close(Moment(one.total, 3).times(X), plain(one) @ X.matrix() / 3)


@pytest.mark.parametrize("name", ["permute", "fluctuation", "smooth"])
def test_scores_of_single_channels_never_ask_for_a_whole_matrix_of_readers(name, monkeypatch):
    space = Space("mlp.0", "mlp", 6, Group.POSITIVE_MONOMIAL)
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    moments = Moments()
    for statistic in (Statistic.RAW, Statistic.WEIGHTED, Statistic.MEAN):
        moments.add((space.name, statistic), x)
    readers = gram(1, 6, 1, False, 0)
    moments.known[space.name, Statistic.READERS] = readers
    rotator = find("rotate", name)()
    expected = rotator.fit(space, moments)
    moments.known[space.name, Statistic.READERS] = Moment(readers.total, 1)
    same = rotator.fit(space, moments)
    assert expected.A.picks.equal(same.A.picks)
    torch.testing.assert_close(expected.A.entries, same.A.entries)
    torch.testing.assert_close(expected.energy, same.energy)
    moments.known[space.name, Statistic.READERS] = readers
    monkeypatch.setattr(Gram, "total", property(lambda _: pytest.fail("the whole was made")))
    rotator.fit(space, moments)
    with pytest.raises(pytest.fail.Exception):  # the control
        find("rotate", "obs")().fit(space, moments)
