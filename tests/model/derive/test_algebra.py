"""Ids, scales and labels on their own, against plain numpy."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from invariance.model.derive.arrays import core, line, unique_pairs, unique_rows, varies
from invariance.model.derive.ids import Ids
from invariance.model.derive.scales import null_space, null_space_mod2, solve

small = st.lists(st.lists(st.integers(-2, 2), min_size=5, max_size=5), min_size=1, max_size=4)


@settings(max_examples=30, deadline=None)
@given(rows=small)
def test_null_spaces_are_whole_and_null(rows: list[list[int]]) -> None:
    M = np.array(rows, dtype=float)
    basis = null_space(M)
    assert np.allclose(M @ basis, 0) and basis.shape[1] == 5 - np.linalg.matrix_rank(M)
    G = (np.array(rows) % 2).astype(np.uint8)
    binary = null_space_mod2(G)
    every = [v for v in np.ndindex(*[2] * 5) if not (G @ np.array(v) % 2).any()]
    assert not (G @ binary.T % 2).any() and 2 ** len(binary) == len(every)


def test_a_dual_pair_has_inverse_scales_and_a_product_their_sum() -> None:
    ids = Ids()
    a, b, c, d = ids.new((4,)).tolist()
    ids.relate(a, b, -1)
    ids.equate([(b, 1), (c, 1), (d, -1)])
    scales = solve(ids, [a, b, c, d])
    assert scales.free_scales == 2 and scales.free_signs == 2
    drawn = scales.draw(np.random.default_rng(0))

    def log(x: int) -> float:
        root, sign = ids.scale(x)
        return sign * drawn[root][0]

    assert np.isclose(log(a), -log(b)) and np.isclose(log(b) + log(c), log(d)) and abs(log(a)) > 0


def test_a_coordinate_that_is_its_own_dual_keeps_signs_only() -> None:
    ids = Ids()
    a, b = ids.new((2,)).tolist()
    ids.relate(a, b, -1)
    ids.relate(a, b, 1)
    scales = solve(ids, [a, b])
    assert scales.free_scales == 0 and scales.free_signs == 1


def test_fixing_one_coordinate_fixes_all_of_its_scale() -> None:
    ids = Ids()
    f = ids.new((3,))
    g = ids.new((3,))
    ids.same(f, g)
    ids.fix(f[:1])
    assert ids.fixed(int(g[0])) and not ids.fixed(int(g[1]))


def test_expanded_arrays_are_looked_at_once() -> None:
    f = torch.arange(3).reshape(3, 1).expand(3, 1000)
    assert core(f).numel() == 3 and varies(f) == (0,) and line(f).tolist() == [0, 1, 2]
    g = torch.arange(5, 8).reshape(3, 1).expand(3, 1000)
    pairs, inverse, shape = unique_pairs(f, g)
    assert pairs.tolist() == [[0, 5], [1, 6], [2, 7]] and shape == (3, 1) and inverse.numel() == 3


def test_different_rows_come_in_order_of_appearance() -> None:
    rows = torch.tensor([[7, 1], [2, 2], [7, 1], [0, 9]])
    different, inverse = unique_rows(rows)
    assert different.tolist() == [[7, 1], [2, 2], [0, 9]] and inverse.tolist() == [0, 1, 0, 2]
