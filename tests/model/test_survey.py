"""The survey of types: the page of families is what the code says, and a failing type is a row, not a traceback."""

from __future__ import annotations

from pathlib import Path

import pytest

from invariance.core.errors import InputError
from invariance.model import survey
from invariance.model.survey import Row, causal_types, families, line_of, table, totals, work

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
SAMPLE = ["llama", "gpt2", "gemma2", "mixtral", "opt", "qwen3"]


@pytest.mark.parametrize("kind", SAMPLE)
def test_the_page_says_what_is_derived_today(kind: str) -> None:
    row = work(kind)
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith(f"| {kind} |")]
    assert row.certified and len(lines) == 1
    said, now = lines[0].split(" | "), line_of(row).split(" | ")
    assert said[1:4] == now[1:4] and said[6:] == now[6:]  # errors and controls differ by rounding


def test_the_page_has_a_row_for_every_type() -> None:
    lines = PAGE.read_text().splitlines()
    assert {line.split(" | ")[0][2:] for line in lines if line.startswith("| ")} >= set(
        causal_types()
    )


def test_an_unknown_type_is_refused_before_any_work() -> None:
    with pytest.raises(InputError, match="lama"):
        list(families(["lama"]))


def test_whatever_fails_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(kind: str) -> None:
        raise RuntimeError("no | good\nat all")

    monkeypatch.setattr(survey, "tiny", fail)
    row = work("llama")
    assert not row.certified and row.reason == "RuntimeError: no | good at all"
    assert "| llama | RuntimeError: no \\| good at all |" in table([row])


def test_a_type_that_takes_too_long_is_a_row() -> None:
    (row,) = families(["llama"], seconds=0.01)
    assert not row.certified and "not done after" in row.reason


def test_totals_count_certified_types_only() -> None:
    rows = [
        Row("a", True, spaces={"residual O(32)": 1, "vo GL(8)": 4}),
        Row("b", True, spaces={"residual PERM±(32)": 1}),
        Row("c", False, spaces={"residual O(32)": 1}),
    ]
    counts = totals(rows)
    assert counts["certified"] == 2 and counts["VO by GL"] == 1
    assert counts["stream rotated (O, O fixing ones, or signed permutations)"] == 2
