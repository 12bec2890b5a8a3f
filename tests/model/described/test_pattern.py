"""Axes as patterns: nothing is lost, and the text says exactly the same."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from invariance.model.described import pattern_text
from invariance.model.described.pattern import (
    RIGID,
    Run,
    Symbol,
    compress,
    expand,
    length,
)

WIDTHS = {"qk@": 96, "vo@": 64, "ch": 40}
SYMBOLS = (RIGID, Symbol("qk@"), Symbol("vo@", (-1,)), Symbol("ch", (0, 1)))


@st.composite
def axes(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """An axis put together from runs, some of them repeated with a shift, as heads are."""
    which, codes = list[int](), list[int]()
    for _ in range(draw(st.integers(1, 4))):
        runs = [
            (
                draw(st.integers(0, 3)),
                draw(st.integers(1, 6)),
                draw(st.integers(0, 8)),
                draw(st.sampled_from([1, 2, -1, 0])),
            )
            for _ in range(draw(st.integers(1, 3)))
        ]
        shift = draw(st.integers(0, 7))
        for i in range(draw(st.integers(1, 5))):
            for symbol, n, start, step in runs:
                which += [symbol] * n
                codes += [0 if symbol == 0 else 10 + start + shift * i + step * k for k in range(n)]
    return np.array(which), np.array(codes)


@given(axes())
def test_a_pattern_holds_every_position_of_its_axis(axis):
    which, codes = axis
    found = list(expand(compress(SYMBOLS, which, codes)))
    symbols = [s for s, c in found for _ in c]
    assert symbols == [SYMBOLS[w] for w in which]
    told = np.concatenate([c if s != RIGID else 0 * c for s, c in found])
    assert (told == codes).all()


@given(axes())
def test_the_text_of_a_pattern_reads_as_the_pattern(axis):
    pattern = compress(SYMBOLS, *axis)
    text = pattern_text.write(pattern, WIDTHS)
    assert pattern_text.read(text, WIDTHS) == pattern
    assert length(pattern) == len(axis[0])


def test_interleaved_heads_of_a_fused_axis_take_one_loop():
    text = "i<64{qk@[24i:+24] vo@^-1[72i:+72] qk@^-1[24i:+24]}"
    pattern = pattern_text.read(text, {"qk@": 1536, "vo@": 4608})
    symbols, which, codes = [], [], []
    for s, c in expand(pattern):
        symbols += [s] if s not in symbols else []
        which += [symbols.index(s)] * len(c)
        codes += c.tolist()
    assert compress(symbols, np.array(which), np.array(codes)) == pattern


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("i<2{qk@", "not closed"),
        ("qk@}", "closes no loop"),
        ("mlp@", "no space 'mlp@'"),
        ("qk@[3j:+4]", "not around it"),
        ("qk@ ?", "cannot be read"),
    ],
)
def test_what_cannot_be_read_is_said(text, why):
    with pytest.raises(ValueError, match=why):
        pattern_text.read(text, WIDTHS)


def test_a_rigid_axis_is_of_any_length():
    assert pattern_text.read("-", {}) == (Run(RIGID, 0),)
    assert pattern_text.write((Run(RIGID, 0),), {}) == "-"
