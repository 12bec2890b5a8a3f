"""The report: golden facts on the page and in the terminal, nothing loaded, everything escaped, gaps bridged."""

from __future__ import annotations

import copy
import io
import math
import re
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console
from ruamel.yaml import YAML

from invariance import report_words as words
from invariance.report import page, table
from invariance.report_charts import POINTS

NASTY = '<script>alert("1")</script> & [red]'
DEPTH = 30
VOID = {"meta", "link", "br", "hr", "img", "input"}
Spectra = dict[str, list[float]]


def _falling(d: int, rate: float) -> list[float]:
    return [math.exp(-rate * n / d) for n in range(d)]


@pytest.fixture
def spectra() -> Spectra:
    points = {f"x.{i}.{s}": _falling(576, 9 + i) for i in range(DEPTH) for s in (0, 1)}
    return {**points, **{f"mlp.{i}": _falling(1536, 5 + i) for i in range(DEPTH)}}


@pytest.fixture
def report() -> dict[str, Any]:
    points = [f"x.{i}.{s}" for i in range(DEPTH) for s in (0, 1)]
    dims = {p: 576 for p in (*points, f"x.{DEPTH}.0")} | {f"mlp.{i}": 1536 for i in range(DEPTH)}
    kept = {p: 432 for p in points} | {f"x.{DEPTH}.0": 576} | {f"mlp.{i}": 1000 + 8 * i for i in range(DEPTH)}
    return {
        "version": "0.1.0",
        "model": {
            "name": "a/b",
            "family": "llama",
            "exported_as": "mistral",
            "stock": True,
            "why_not_stock": None,
        },
        "output": "runs/a run",
        "recipe": {"model": "a/b", "steps": [{"spaces": ["residual"], "rotate": {"pca": {"of": "raw"}}}]},
        "parameters": {
            "dense": {
                "total": 134_515_008,
                "embedding": 28_311_552,
                "blocks": 106_202_880,
                "shortcuts": 0,
                "head": 576,
            },
            "sliced": {
                "total": 107_612_006,
                "embedding": 21_233_664,
                "blocks": 75_000_000,
                "shortcuts": 11_378_342,
                "head": 0,
            },
        },
        "flops_per_token": {"dense": 268_900_000, "sliced": 215_120_000},
        "kv_bytes_per_token": {"dense": 23040, "sliced": 17280},
        "perplexity": {"sotu": {"dense": 45.5, "sliced": 78.75, "recovered": 60.5, "tokens": 8176}},
        "exactness": {
            "relative_error": 4.1e-14,
            "tolerance": 7e-12,
            "negative_control": 0.87,
            "spaces": 91,
            "passed": True,
        },
        "widths": kept,
        "dims": dims,
        "kinds": {name: "residual" if name.startswith("x.") else "mlp" for name in dims},
        "tokens_per_second": {"dense": 812.0, "sliced": 903.0},
        "samples": [
            {
                "prompt": "The people",
                "dense": " have a history",
                "sliced": " have been",
                "recovered": " have seen",
            }
        ],
        "recover": {
            "weights": "lora",
            "trained_parameters": 2_500_000,
            "tokens": 262_144,
            "best_step": 90,
            "steps": 128,
            "tokens_per_second": 310.5,
            "held_out": {"before": 80.25, "after": 61.5, "tokens": 8192},
            "curve": [
                {"step": s, "held_out_loss": loss} for s, loss in ((0, 4.385), (64, math.inf), (90, 4.119))
            ],
        },
        "seconds": {"calibrate": 96.4, "fit": 31.0},
        "peak_memory_bytes": 3 * 2**30,
        "versions": {"python": "3.11.2", "torch": "2.9.0"},
    }


@pytest.fixture
def gaps(report: dict[str, Any]) -> dict[str, Any]:
    """A report of a run that measured nothing beyond its parameters."""
    empty = {key: {} for key in ("perplexity", "exactness", "widths", "dims", "kinds", "seconds", "versions")}
    unknown = {"dense": None, "sliced": None}
    nothing = {key: unknown for key in ("tokens_per_second", "flops_per_token", "kv_bytes_per_token")}
    return {
        **report,
        **empty,
        **nothing,
        "samples": [],
        "recover": None,
        "output": None,
        "peak_memory_bytes": None,
    }


class _Page(HTMLParser):
    """Every start tag with its attributes, and the text that a reader sees; raises where tags do not close."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.said: list[str] = []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.said.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.said)


def _drawings(html: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL)]


def _terminal(report: dict[str, Any], width: int = 100) -> str:
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    console.print(table(report))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_page_states_the_golden_facts(report, spectra):
    text = _Page(page(report, spectra)).text
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
    recipe = _Page(page(report, spectra)).said
    assert report["recipe"] in [YAML(typ="safe").load(text) for text in recipe if text.startswith("model:")]


def test_the_page_loads_and_runs_nothing(report, spectra):
    html = page(report, spectra)
    assert not re.search(r"https?://|@import|url\(", html)
    for tag, attributes in _Page(html).tags:
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
    assert _Page(html).text.count(NASTY) >= 8
    assert all(_drawings(html))
    report["samples"][0]["sliced"] = ""
    assert NASTY in _terminal(report, 200)


def test_the_curve_of_recovery_is_drawn_where_there_was_one(report, spectra):
    said = _Page(page(report, spectra)).text
    assert "perplexity 80.25 before, 61.50 after; 310 tokens a second" in said
    with_curve = page(report, spectra)
    report["recover"] = {**report["recover"], "curve": []}
    assert len(_drawings(with_curve)) == len(_drawings(page(report, spectra))) + 1


@pytest.mark.parametrize(
    "drawn", [{}, {"x.0.0": []}, {"x.0.0": [0.0] * 4}, {"x.0.0": [1.0]}, {"mlp.0": [math.nan, 1.0, -1e-20]}]
)
def test_what_was_not_measured_leaves_a_gap_and_no_error(gaps, drawn):
    html = page(gaps, drawn)
    assert "This run has no evaluation." in _Page(html).text
    assert "nan" not in "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))
    assert "parameters" in _terminal(gaps)


def test_each_value_alone_may_be_missing(report, spectra, gaps):
    for key in report:
        changed = {**copy.deepcopy(report), key: gaps[key]}
        _Page(page(changed, spectra))
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
    tags = _Page(page(report, spectra)).tags
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
    text = _Page(page(report, spectra)).text
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
    assert "Predicted to second order, by gradients of the dense model: +0.250" in page(report, spectra)
    assert "+0.250 nats per token; measured, on the first of these data: +0.312" in page(report, spectra)
    report["predicted"]["measured"] = None
    assert "+0.250 nats per token." in page(report, spectra)
