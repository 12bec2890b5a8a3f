"""Operators: whatever form a matrix is stored in, it does what the matrix does, and a permutation never becomes one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import seeds
from torch import Tensor

from invariance.core.change import Basis, Change, bridge
from invariance.core.dense import Dense, as_operator, compose, in_group, pairs_kept
from invariance.core.group import Group
from invariance.core.operator import Operator
from invariance.core.pick import Pick
from invariance.core.space import Space

F64 = torch.float64


def randn(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=g, dtype=F64)


@st.composite
def operators(draw: st.DrawFn) -> Operator:
    """Dense ones and picks, with scales and without, of any shape; a pick may pick a coordinate twice."""
    g = torch.Generator().manual_seed(draw(seeds))
    c, d, k = (draw(st.integers(1, n)) for n in (3, 6, 6))
    form = draw(st.sampled_from(["dense", "pick", "scaled"]))
    if form == "dense":
        return Dense(randn(g, c, d, k))
    index = torch.randint(d, (c, k), generator=g)
    return Pick(index, d, randn(g, c, k) if form == "scaled" else None)


@given(X=operators(), r=st.integers(1, 3), axis=st.integers(-3, 2), seed=seeds)
def test_an_operator_does_what_its_matrix_does(X, r, axis, seed):
    g, (c, d, k) = torch.Generator().manual_seed(seed), X.shape
    M = X.matrix()
    assert M.shape == X.shape and M.dtype == F64
    left, right = randn(g, c, 2, d), randn(g, c, k, 2)
    torch.testing.assert_close(left @ X, left @ M)
    torch.testing.assert_close(X @ right, M @ right)
    runs = c * r
    blocks = torch.block_diag(*M.repeat_interleave(r, 0))  # neighbouring runs share a copy
    for there, back, n in ((X.contract, blocks, d), (X.back, blocks.mT, k)):
        shape = [2, 3, 4]
        shape[axis] = runs * n
        W = randn(g, *shape)
        expected = torch.tensordot(W, back, ([axis], [0])).movedim(-1, axis)
        torch.testing.assert_close(there(W, axis, runs), expected)
    torch.testing.assert_close(X.grained(r).matrix(), torch.kron(M, torch.eye(r, dtype=F64)))
    assert X.pattern().matrix().equal((M != 0).double())
    by = randn(g, c, k)
    torch.testing.assert_close(X.scaled(by).matrix(), M * by.unsqueeze(-2))


@given(X=operators(), seed=seeds)
def test_columns_and_copies_are_those_of_the_matrix(X, seed):
    g, (c, _, k) = torch.Generator().manual_seed(seed), X.shape
    M = X.matrix()
    same, own = torch.randint(k, (3,), generator=g), torch.randint(k, (c, 3), generator=g)
    assert X.columns(same).matrix().equal(M[..., same])
    assert X.columns(own).matrix().equal(M.take_along_dim(own.unsqueeze(-2), -1))
    some = torch.randint(c, (2,), generator=g)
    assert X.take(some).matrix().equal(M[some])


@given(X=operators(), Y=operators())
def test_products_are_those_of_the_matrices(X, Y):
    Y = Y.take(torch.zeros(X.copies, dtype=torch.int64))
    if X.width != Y.dim:
        Y = as_operator(torch.ones(X.copies, X.width, 2, dtype=F64))
    torch.testing.assert_close(compose(X, Y).matrix(), X.matrix() @ Y.matrix())
    if X.width == Y.dim and isinstance(X, Pick) and isinstance(Y, Pick):
        assert isinstance(compose(X, Y), Pick)


@given(X=operators())
def test_a_matrix_is_recognised_as_what_it_does(X):
    found, M = as_operator(X.matrix()), X.matrix()
    picks = bool(((M != 0).sum(-2) == 1).all())
    assert isinstance(found, Pick) == picks and found.matrix().equal(M)
    assert (X.picks is None) == (not picks)
    assert as_operator(X) is X


@pytest.mark.parametrize("group", Group)
@given(rotary=st.sampled_from([0, 4]), spared=st.integers(1, 3), seed=seeds)
def test_group_and_pairs_do_not_hang_on_the_form(group, rotary, spared, seed):
    """Each element that is a pick, and each of those with a fault, is judged as its matrix would be by arithmetic."""
    s = Space("s", "qk", rotary + spared, group, 2, rotary if group is Group.ROTARY else 0)
    A = s.element(seed)
    assert s.contains(A) and s.contains(A.matrix())
    if not isinstance(A, Pick):
        return
    d = s.dim
    twice = Pick(A.index.clone().fill_(0), d, A.scale) if d > 1 else A.scaled(torch.zeros(2, 1))
    nan = A.scaled(torch.full((2, d), torch.nan))
    assert not any(in_group(g, X) for g in Group for X in (twice, nan, A.columns(torch.arange(0))))
    eye = torch.eye(d, dtype=F64)
    M = A.matrix()
    monomial = M.abs().sum(-1).amin() > 0
    assert in_group(Group.ORTHOGONAL, A) == torch.allclose(M.mT @ M, eye.expand_as(M))
    assert in_group(Group.POSITIVE_MONOMIAL, A) == bool(monomial and (M >= 0).all())
    assert in_group(Group.IDENTITY, A) == M.equal(eye.expand_as(M))


@given(half=st.integers(1, 4), spared=st.integers(0, 2), seed=seeds, data=st.data())
def test_pairs_are_found_in_a_pick_as_in_its_entries(half, spared, seed, data):
    g = torch.Generator().manual_seed(seed)
    d, n = 2 * half + spared, data.draw(st.integers(1, half))
    kept = torch.randperm(half, generator=g)[:n]
    turned = torch.rand(n, generator=g) < 0.5  # by 90°: the second dim, and minus the first
    left, right = torch.where(turned, kept + half, kept), torch.where(turned, kept, kept + half)
    sign = torch.where(turned, -1.0, 1.0).double()
    index = torch.cat((left, right, torch.arange(2 * half, d)))[None]
    scale = torch.cat((torch.ones(n), sign, torch.ones(spared)))[None].double()
    good = Pick(index, d, scale)
    assert pairs_kept(good, 2 * half).equal(kept[None])
    split = Pick(index.roll(1, -1), d, scale)
    bent = good.scaled(
        torch.ones(1, d - 2 * (half - n)).double().index_fill(1, torch.tensor([0]), 2)
    )
    gone = good.scaled(torch.zeros_like(scale))
    for X in (good, split, bent, gone):
        found, dense = X.pairs(2 * half), Dense(X.matrix()).pairs(2 * half)
        assert (found is None) == (dense is None) and (found is None or found.equal(dense))
    assert bent.pairs(2 * half) is None and gone.pairs(2 * half) is None


@given(seed=seeds, group=st.sampled_from(list(Group)), copies=st.integers(1, 2))
def test_a_rotation_of_an_operator_is_that_of_its_matrix(seed, group, copies):
    s = Space("s", "qk", 6, group, copies, 4 if group is Group.ROTARY else 0)
    A = s.element(seed)
    change, same = Change.rotation(A), Change.rotation(A.matrix())
    torch.testing.assert_close(change.decode.matrix(), torch.linalg.inv(A.matrix()).mT)
    assert change.decode.matrix().equal(same.decode.matrix())


@given(seed=seeds, copies=st.integers(1, 2), grain=st.integers(1, 3), seen=st.booleans())
def test_what_readers_get_is_the_projected_signal_and_the_offset(seed, copies, grain, seen):
    g = torch.Generator().manual_seed(seed)
    s = Space("s", "heads", 4, Group.PERMUTATION, copies, grain=grain)
    E = Pick(torch.stack([torch.randperm(4, generator=g)[:3] for _ in range(copies)]), 4)
    D = randn(g, copies, s.seen, 3 * grain) if seen else randn(g, copies, 4, 3)
    offset = randn(g, copies, s.seen)
    x = randn(g, 5, 2 * copies * s.seen)
    wide = D if seen else torch.kron(D, torch.eye(grain, dtype=F64))
    P = wide @ E.grained(grain).matrix().mT
    runs = x.unflatten(-1, (copies, 2, s.seen))
    expected = torch.einsum("ncrd,ced->ncre", runs, P) + offset[:, None]
    found = Change(E, D, offset).read(s, x)
    torch.testing.assert_close(found, expected.flatten(1))


@given(X=operators(), Y=operators())
def test_the_bridge_between_two_bases(X, Y):
    if X.dim != Y.dim:
        Y = Dense(torch.ones(1, X.dim, 2, dtype=F64))
    found = bridge(Change(X, X), Change(Y, Y))
    torch.testing.assert_close(found, X.matrix()[0].mT @ Y.matrix()[0])


def test_a_permutation_of_many_channels_is_never_a_matrix(monkeypatch):
    """At this width, one matrix of d × d would take 80 GB."""
    d, k = 100_000, 60_000
    monkeypatch.setattr(Pick, "matrix", lambda _: pytest.fail("a matrix was made"))
    for group in (Group.PERMUTATION, Group.MONOMIAL):
        s = Space("mlp.0", "mlp", d, group)
        basis = Basis(s.element(0), torch.ones(1, d))
        assert s.contains(basis.A) and basis.nbytes < 2**22
        change = Change.rotation(basis.A).columns(s.kept(k))
        W = torch.randn(2, d)
        assert change.encode.contract(W).shape == change.decode.contract(W).shape == (2, k)
        assert change.read(s, W).shape == (2, d)
        assert Change.empty(s, k).width == k and change.encode.nbytes < 2**21
