"""Groups: their order is inclusion, their elements are members, and whatever is not a member is refused."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import seeds

from invariance.core.change import Change
from invariance.core.dense import in_group, pairs_kept
from invariance.core.group import Group
from invariance.core.space import Space, haar
from invariance.model.attention import turn

groups = st.sampled_from(list(Group))


def space(group: Group, dim: int = 6, copies: int = 2, rotary: int = 4, name: str = "s") -> Space:
    return Space(name, "qk", dim, group, copies, rotary if group is Group.ROTARY else 0)


@st.composite
def spaces(draw: st.DrawFn, least: int = 1) -> Space:
    dim = draw(st.integers(least, 9))
    rotary = 2 * draw(st.integers(0, dim // 2))
    return space(draw(groups), dim, draw(st.integers(1, 3)), rotary)


def test_the_order_of_groups_is_a_partial_order_with_two_ends():
    for a, b, c in product(Group, repeat=3):
        assert a <= a
        assert a is b or not (a <= b and b <= a)
        assert a <= c or not (a <= b and b <= c)
    assert all(Group.IDENTITY <= g <= Group.INVERTIBLE for g in Group)
    assert all(g.why for g in Group)


@pytest.mark.parametrize("a", Group)
def test_elements_of_one_group_are_in_another_exactly_where_the_order_says_so(a):
    drawn = [
        space(a).element(seed).matrix() for seed in range(4)
    ]  # one alone may be in a narrower group by chance
    for b in Group:
        assert all(in_group(b, A, rotary=4) for A in drawn) == (a <= b), b
        assert space(b).admits(a) == (a <= b)


@given(s=spaces(), seed=seeds)
def test_elements_are_members_and_well_conditioned(s, seed):
    A = s.element(seed).matrix()
    assert A.shape == (s.copies, s.dim, s.dim) and A.dtype == torch.float64
    assert s.contains(A)
    assert torch.linalg.cond(A).amax() <= 4 * (1 + 1e-12)


@given(s=spaces(), seed=seeds)
def test_products_and_inverses_of_elements_are_members(s, seed):
    A, B = s.element(seed).matrix(), s.element(seed + 1).matrix()
    assert s.contains(A @ B) and s.contains(torch.linalg.inv(A))


def test_elements_depend_on_seed_and_name_alone():
    for group in Group:
        one, same, renamed = (space(group, dim=9, copies=3, name=n) for n in ("a", "a", "b"))
        assert torch.equal(one.element(5).matrix(), same.element(5).matrix())
        if group is not Group.IDENTITY:
            assert not torch.equal(one.element(5).matrix(), one.element(6).matrix())
            assert not torch.equal(one.element(5).matrix(), renamed.element(5).matrix())
            assert not torch.equal(
                one.element(5).matrix()[0], one.element(5).matrix()[1]
            )  # each copy has its own
    assert (
        space(Group.ORTHOGONAL, name="x.0.0").generator(7).initial_seed() == 69767753519167360
    )  # from SHA-256


@given(s=spaces(least=2), seed=seeds, data=st.data())
def test_what_is_nearly_an_element_is_refused(s, seed, data):
    A = s.element(seed).matrix()
    noise = torch.randn(s.dim, s.dim, generator=s.generator(seed + 1), dtype=torch.float64)
    copy = data.draw(st.integers(0, s.copies - 1), label="copy")  # one bad copy is enough
    nudged = A.clone()
    nudged[copy] += 1e-6 * noise
    invertible = s.group is Group.INVERTIBLE or (s.group is Group.ROTARY and not s.rotary)
    assert s.contains(nudged) == invertible
    for bad in (float("nan"), float("inf")):
        broken = A.clone()
        broken[copy, 0, 0] = bad
        assert not s.contains(broken)
    singular = A.clone()
    singular[copy, :, 0] = 0
    assert not s.contains(singular)
    assert not s.contains(torch.zeros_like(A))


@pytest.mark.parametrize("group", Group)
def test_the_wrong_shape_is_refused(group):
    s = space(group)
    A = s.element(0).matrix()
    assert s.contains(A)
    assert not s.contains(A[:1]) and not s.contains(A[:, :5, :5]) and not s.contains(A[0])


@pytest.mark.parametrize(
    ("A", "narrowest"),
    [
        ([[1, 0], [0, 1]], Group.IDENTITY),
        ([[0, 1], [1, 0]], Group.PERMUTATION),
        ([[0, -1], [1, 0]], Group.SIGNED_PERMUTATION),
        ([[0, 3], [1, 0]], Group.POSITIVE_MONOMIAL),
        ([[0, 3], [-1, 0]], Group.MONOMIAL),
        ([[0.6, 0.8], [0.8, -0.6]], Group.ORTHOGONAL),
        ([[2, 1], [-1, 2]], Group.ROTARY),
        ([[2, 1], [1, 2]], Group.INVERTIBLE),
    ],
)
def test_matrices_whose_group_is_known(A, narrowest):
    A = torch.tensor([A], dtype=torch.float64)
    assert in_group(narrowest, A, rotary=2)
    assert all(in_group(g, A, rotary=2) for g in Group if narrowest <= g)
    assert not any(in_group(g, A, rotary=2) for g in Group if g <= narrowest and g is not narrowest)


@given(half=st.integers(1, 4), spared=st.integers(0, 3), seed=seeds)
def test_rotary_elements_commute_with_positions_and_others_do_not(half, spared, seed):
    s = space(Group.ROTARY, 2 * half + spared, 1, 2 * half)
    g = s.generator(seed)
    angles = torch.rand(5, half, generator=g, dtype=torch.float64).repeat(1, 2) * 6
    x = torch.randn(5, s.dim, generator=g, dtype=torch.float64)

    def commutes(A, moved):
        there = angles[:, torch.cat((moved, moved + half))]
        return torch.allclose(
            turn(x @ A, there.cos(), there.sin()), turn(x, angles.cos(), angles.sin()) @ A
        )

    A = s.element(seed).matrix()
    (moved,) = pairs_kept(A, s.rotary)
    assert moved.sort()[0].equal(torch.arange(half))
    assert commutes(A[0], moved)
    if (
        half > 1
    ):  # the controls: frequencies that stay behind, or go elsewhere; an element plus something else
        assert commutes(A[0], torch.arange(half)) == moved.equal(torch.arange(half))
        assert not commutes(A[0], moved.roll(1))
    assert not commutes(A[0] + torch.diag(torch.arange(s.dim)), moved)


@given(
    half=st.integers(1, 4),
    spared=st.integers(0, 3),
    copies=st.integers(1, 3),
    seed=seeds,
    data=st.data(),
)
def test_a_cut_keeps_whole_pairs_and_what_positions_spare(half, spared, copies, seed, data):
    s = space(Group.ROTARY, 2 * half + spared, copies, 2 * half)
    fitting = [k for k in range(s.dim + 1) if s.fits(k)]
    assert fitting == [spared + 2 * n for n in range(1, half + 1)]
    n = data.draw(st.integers(1, half), label="pairs")
    columns = s.kept(spared + 2 * n)
    A = s.element(seed).matrix()
    assert pairs_kept(A[..., columns], s.rotary).equal(pairs_kept(A, s.rotary)[:, :n])
    assert columns.tolist() == [*range(n), *range(half, half + n), *range(2 * half, s.dim)]
    for k in set(range(s.dim + 1)) - set(fitting):
        with pytest.raises(ValueError, match="split a frequency pair"):
            s.kept(k)
    if (
        half > 1
    ):  # the controls: half a pair more, the first columns whatever they are, a pair split between two
        assert pairs_kept(A[..., : 2 * half - 1], s.rotary) is None
        split = A[..., columns].clone()
        split[..., n : 2 * n] = split[..., n : 2 * n].roll(1, 1)
        assert pairs_kept(split, s.rotary) is None
        mixed = A + A[..., [*range(1, 2 * half), 0, *range(2 * half, s.dim)]]
        assert pairs_kept(mixed[..., columns], s.rotary) is None
    if spared:
        leaking = A.clone()
        leaking[0, -1, 0] += 0.1
        assert pairs_kept(leaking, s.rotary) is None


def test_first_moments_of_haar_measure():
    n, d = 600, 4
    g = torch.Generator().manual_seed(0)
    Q = torch.stack([haar(d, g) for _ in range(n)])
    assert in_group(Group.ORTHOGONAL, Q)
    sigma = (d * n) ** -0.5  # of the mean of n entries of variance 1/d
    assert (
        Q.mean(0).abs().amax() < 4.5 * sigma
    )  # a QR without its signs set right has a biased diagonal
    assert (Q.square().mean(0) - 1 / d).abs().amax() < 4.5 * sigma
    assert abs((torch.linalg.det(Q) > 0).double().mean() - 0.5) < 4.5 * 0.5 * n**-0.5


@given(s=spaces(), seed=seeds, data=st.data())
def test_a_rotation_is_undone_by_its_decode_and_a_slice_projects(s, seed, data):
    change = Change.rotation(s.element(seed))
    eye = torch.eye(s.dim, dtype=torch.float64).expand(s.copies, -1, -1)
    assert change.width == s.dim
    torch.testing.assert_close(change.encode.matrix() @ change.decode.matrix().mT, eye)
    k = data.draw(st.integers(1, s.dim), label="width")
    E, D = change.encode.matrix()[..., :k], change.decode.matrix()[..., :k]
    P = E @ D.mT
    torch.testing.assert_close(P @ P, P)
    assert (torch.linalg.matrix_rank(P) == k).all()
    assert Change.empty(s, k).encode.shape == E.shape and Change.empty(s, k).width == k
