"""What is said of several texts: ratios, their geometric mean, the worst, in calibration and out of it."""

from __future__ import annotations

import math

import pytest

from invariance.measure.texts import texts
from invariance.report.document import Texts
from invariance.report.evaluations import texts as tables
from invariance.report.evaluations import warning
from invariance.report.reading import checked


def measured(dense: float, sliced: float, recovered: float | None = None):
    sides = {"dense": dense, "sliced": sliced}
    sides |= {} if recovered is None else {"recovered": recovered}
    return {**sides, "loss": {side: {} for side in sides}, "tokens": 8}


FOUND = {"novel": measured(10, 11), "code": measured(5, 10), "mix": measured(8, 16)}
SOURCES = [("novel", ["a.txt"]), ("code", ["packaged:python"]), ("mix", ["b.txt", "a.txt"])]


def test_ratios_mean_and_worst_are_those_of_arithmetic():
    found = texts(FOUND, SOURCES, ["a.txt"])
    assert found["each"]["novel"] == {"calibrated": True, "ratio": {"sliced": 1.1}}
    assert [t["calibrated"] for t in found["each"].values()] == [True, False, True]
    assert found["all"]["sliced"]["geometric_mean"] == pytest.approx((1.1 * 2 * 2) ** (1 / 3))
    assert found["all"]["sliced"]["worst"] == 2.0 and found["all"]["sliced"]["worst_text"] == "code"
    inside, outside = found["calibrated"]["sliced"], found["unseen"]["sliced"]
    assert inside["geometric_mean"] == pytest.approx((1.1 * 2) ** 0.5)
    assert inside["worst_text"] == "mix" and outside["worst_text"] == "code"
    assert outside["geometric_mean"] == pytest.approx(2.0)


def test_without_a_calibration_that_is_known_no_text_is_in_or_out():
    found = texts(FOUND, SOURCES, None)
    assert [t["calibrated"] for t in found["each"].values()] == [None] * 3
    assert found["calibrated"] == found["unseen"] == {} and found["all"]["sliced"]["worst"] == 2.0


def test_an_infinite_perplexity_is_the_worst_and_one_that_is_no_number_is_left_out():
    found = texts({"a": measured(1, math.inf), "b": measured(1, 2)}, [("a", []), ("b", [])], [])
    assert found["all"]["sliced"]["worst"] == math.inf
    assert found["all"]["sliced"]["geometric_mean"] == math.inf
    found = texts({"a": measured(1, math.nan), "b": measured(1, 2)}, [("a", []), ("b", [])], [])
    assert found["all"]["sliced"]["worst_text"] == "b" and found["each"]["a"]["ratio"] == {}


def test_every_side_has_its_own_numbers():
    found = texts({"a": measured(2, 4, 3), "b": measured(2, 6, 3)}, [("a", []), ("b", [])], ["x"])
    assert found["all"]["recovered"] == {
        "geometric_mean": pytest.approx(1.5),
        "worst": 1.5,
        "worst_text": "a",
    }


def test_the_table_shows_each_text_and_warns_where_unseen_ones_lose_more():
    report = checked(Texts, texts(FOUND, SOURCES, ["a.txt"]), "here")
    (grid,) = tables(report)
    rows = {row[0]: row[1:] for row in grid.rows}
    assert rows["novel"] == ["yes", "1.100×"] and rows["code"] == ["no", "2.000×"]
    assert rows["geometric mean, calibrated on"] == ["", "1.483×"]
    assert rows["worst, not calibrated on"] == ["", "2.000×"]
    assert "2.00× against 1.48×" in grid.caption and "mixture" in warning(report)
    even = {"a": measured(1, 1.2), "b": measured(1, 1.3)}
    calm = checked(Texts, texts(even, [("a", ["x"]), ("b", ["y"])], ["x"]), "here")
    assert warning(calm) == "" and len(tables(calm)) == 1


def test_one_text_or_none_makes_no_table():
    assert tables(Texts()) == []
    assert tables(checked(Texts, texts({"a": measured(1, 2)}, [("a", [])], []), "here")) == []
