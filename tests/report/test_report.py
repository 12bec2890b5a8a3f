"""The report: golden facts on the page and in the terminal, nothing loaded, everything escaped, gaps bridged."""

# ruff: noqa: F401, F811 - fixtures are imported, and named by arguments

from __future__ import annotations

import copy
import io
import math
import re
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import pytest
from pages import DEPTH, NASTY, VOID, Page, Spectra, _falling, report
from rich.console import Console
from ruamel.yaml import YAML

from invariance.report import words
from invariance.report.charts import POINTS
from invariance.report.report import page, table


@pytest.fixture
def spectra() -> Spectra:
    points = {f"x.{i}.{s}": _falling(576, 9 + i) for i in range(DEPTH) for s in (0, 1)}
    return {**points, **{f"mlp.{i}": _falling(1536, 5 + i) for i in range(DEPTH)}}


@pytest.fixture
def gaps(report: dict[str, Any]) -> dict[str, Any]:
    """A report of a run that measured nothing beyond its parameters."""
    empty = {
        key: {}
        for key in ("perplexity", "exactness", "widths", "dims", "kinds", "seconds", "versions")
    }
    unknown = {"dense": None, "sliced": None}
    nothing = {
        key: unknown for key in ("tokens_per_second", "flops_per_token", "kv_bytes_per_token")
    }
    return {
        **report,
        **empty,
        **nothing,
        "samples": [],
        "recover": None,
        "output": None,
        "peak_memory_bytes": None,
    }


def _drawings(html: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL)]


def _terminal(report: dict[str, Any], width: int = 100) -> str:
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    console.print(table(report))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_page_states_the_golden_facts(report, spectra):
    text = Page(page(report, spectra)).text
    for fact in (
        "a/b (llama) went from 134.5M to 107.6M stored parameters (0.80×).",
        "432 to 576 (434 on average) of 576 in 61 spaces (residual stream)",
        "1000 to 1232 (1116 on average) of 1536 in 30 spaces (MLP)",
        "Perplexity on sotu went from 45.50 to 78.75 (1.73×), and to 60.50 after recovery.",
        "Recovery trained 2.5M parameters (lora) on 262.1k tokens; the best was after step 90 of 128; "
        "TRAINING DIVERGED by step 64, lower `learning_rate`.",
        "certified exact, to 4.1e-14",
        "within the 7.0e-12 that rounding alone explains",
        "half of a change moves them by 0.87",
        "ordinary 'mistral' checkpoint",
        "passed",
        "22.5\xa0KiB",
        "3.0\xa0GiB",
        "96.4",
        "2.9.0",
        "have a history",
        "invariance run 'runs/a run/recipe.yaml' --output 'runs/a run-again'",
    ):
        assert fact in text


def test_the_page_holds_the_recipe_in_full(report, spectra):
    recipe = Page(page(report, spectra)).said
    assert report["recipe"] in [
        YAML(typ="safe").load(text) for text in recipe if text.startswith("model:")
    ]


def test_the_page_loads_and_runs_nothing(report, spectra):
    html = page(report, spectra)
    assert not re.search(r"https?://|@import|url\(", html)
    for tag, attributes in Page(html).tags:
        assert tag not in {"script", "link", "img", "iframe", "object", "embed"}
        assert not {name for name in attributes if name in {"src", "href"} or name.startswith("on")}
    assert "default-src 'none'" in html
    assert len(html) < 1_000_000


def test_whatever_names_and_samples_hold_is_shown_as_text(report, spectra):
    report["model"] = {**report["model"], "name": NASTY, "stock": False, "why_not_stock": NASTY}
    report["output"] = NASTY
    report["recipe"] = {"model": NASTY}
    report["perplexity"] = {NASTY: report["perplexity"]["sotu"]}
    report["samples"] = [{"prompt": NASTY, "dense": NASTY, "sliced": "\x00\ud800 end"}]
    report["versions"] = report["seconds"] = {}
    report["widths"] |= {f"x.0.{NASTY}": 1}
    html = page(report, {**spectra, f"x.0.{NASTY}": [1.0, 0.5]})
    assert "<script" not in html
    assert "\ufffd\ufffd end" in html and html.encode("utf-8")
    assert Page(html).text.count(NASTY) >= 8
    assert all(_drawings(html))
    report["samples"][0]["sliced"] = ""
    assert NASTY in _terminal(report, 200)


def test_the_curve_of_recovery_is_drawn_where_there_was_one(report, spectra):
    said = Page(page(report, spectra)).text
    assert "perplexity 80.25 before, 61.50 after; 310 tokens a second" in said
    with_curve = page(report, spectra)
    report["recover"] = {**report["recover"], "curve": []}
    assert len(_drawings(with_curve)) == len(_drawings(page(report, spectra))) + 1


@pytest.mark.parametrize(
    "drawn",
    [{}, {"x.0.0": []}, {"x.0.0": [0.0] * 4}, {"x.0.0": [1.0]}, {"mlp.0": [math.nan, 1.0, -1e-20]}],
)
def test_what_was_not_measured_leaves_a_gap_and_no_error(gaps, drawn):
    html = page(gaps, drawn)
    assert "This run has no evaluation." in Page(html).text
    assert "nan" not in "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))
    assert "parameters" in _terminal(gaps)


def test_each_value_alone_may_be_missing(report, spectra, gaps):
    for key in report:
        changed = {**copy.deepcopy(report), key: gaps[key]}
        Page(page(changed, spectra))
        _terminal(changed)


def test_charts_are_well_formed_named_and_light(report, spectra):
    drawings = _drawings(page(report, spectra))
    assert len(drawings) == 1 + 1 + 2 + 2  # errors, recovery, widths and spectra of two kinds
    for svg in drawings:
        assert [child.tag for child in svg][:2] == ["title", "desc"]
        assert all(child.text for child in svg[:2])
        assert all(len(path.get("d", "").split("L")) <= POINTS for path in svg.iter("path"))
        _, _, width, height = map(float, svg.get("viewBox", "").split())
        for rect in svg.iter("rect"):
            x, y, w, h = (float(rect.get(key, "")) for key in ("x", "y", "width", "height"))
            assert x >= 0 and y >= 0 and w > 0 and h >= 0 and x + w <= width and y + h <= height


def test_bars_and_curves_say_their_numbers_on_hover(report, spectra):
    titles = [t.text for svg in _drawings(page(report, spectra)) for t in svg.iter("title")]
    assert "mlp.3: 1024 of 1536 kept" in titles
    assert any(t and t.startswith("x.0.1: 432 of 576 directions kept, 99.") for t in titles)


def test_tables_have_captions_and_headers(report, spectra):
    tags = Page(page(report, spectra)).tags
    names = [tag for tag, _ in tags]
    assert names.count("caption") == names.count("table") == 3
    assert {a.get("scope") for tag, a in tags if tag == "th"} == {"row", "col"}


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({"relative_error": 0.4}, "the rotated model computes something else"),
        ({"negative_control": 1e-13}, "too little for the test to mean anything"),
    ],
)
def test_a_failed_certificate_says_why(report, spectra, change, verdict):
    report["exactness"] |= {**change, "passed": False}
    text = Page(page(report, spectra)).text
    assert verdict in text and "failed" in text and "certified" not in text
    assert verdict in " ".join(_terminal(report).split())


def test_the_terminal_states_the_golden_facts(report):
    lines = [re.sub(r"[│\s]+", " ", line).strip() for line in _terminal(report).splitlines()]
    for row in (
        "parameters 134.5M 107.6M 0.80×",
        "blocks + shortcuts 106.2M 86.4M 0.81×",
        "perplexity, sotu 45.50 78.75 1.73×",
        "after recovery 45.50 60.50 1.33×",
        "tokens per second 812 903 1.11×",
        "have a history have been have seen",
        "checkpoint runs/a run/model",
        "report runs/a run/report.html",
    ):
        assert row in lines


@pytest.mark.parametrize(
    ("value", "largest", "said"),
    [
        (0, 1e9, "0"),
        (576, 1e8, "0.6k"),
        (5124, None, "5,124"),
        (134_515_008, None, "134.5M"),
        (7e10, None, "70.00B"),
    ],
)
def test_counts_stand_in_the_unit_of_the_largest(value, largest, said):
    assert words.count(value, largest) == said


def test_a_predicted_loss_stands_beside_the_measured_one(report, spectra):
    assert "Predicted" not in page(report, spectra)
    report["predicted"] = {"loss": 0.25, "by": "gradients", "measured": 0.3125}
    assert "Predicted to second order, by gradients of the dense model: +0.250" in page(
        report, spectra
    )
    assert "+0.250 nats per token; measured, on the first of these data: +0.312" in page(
        report, spectra
    )
    report["predicted"]["measured"] = None
    assert "+0.250 nats per token." in page(report, spectra)
