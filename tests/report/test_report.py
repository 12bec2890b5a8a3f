"""The report: golden facts on the page and in the terminal, nothing loaded, everything escaped, gaps bridged."""

# ruff: noqa: F401, F811 - fixtures are imported, and named by arguments

from __future__ import annotations

import copy
import io
import json
import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from folders import invoke
from pages import DEPTH, NASTY, Page, Spectra, _falling, report
from rich.console import Console
from ruamel.yaml import YAML

from invariance.core.errors import InputError
from invariance.report import figures as drawing
from invariance.report import page as pages
from invariance.report import units
from invariance.report.document import Report
from invariance.report.grid import Grid, latex
from invariance.report.plots import POINTS, Point, curves
from invariance.report.reading import checked, read, read_spectra
from invariance.report.units import folded, method, span

SVG = "{http://www.w3.org/2000/svg}"
Found = dict[str, Any]


def page(report: Found, spectra: Spectra, draw: bool = True) -> str:
    return pages.page(checked(Report, report, "report.json"), spectra, None if draw else [])


def few(report: Found) -> Found:
    """Two blocks of it, which are drawn in no time."""
    kept = {n: w for n, w in report["widths"].items() if n.split(".")[1] in ("0", "1")}
    return {**report, "widths": kept}


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
    console.print(pages.table(checked(Report, report, "report.json")))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_page_states_the_golden_facts(report, spectra):
    text = Page(page(report, spectra, draw=False)).text
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
    recipe = Page(page(report, spectra, draw=False)).said
    assert report["recipe"] in [
        YAML(typ="safe").load(text) for text in recipe if text.startswith("model:")
    ]


def test_the_page_loads_and_runs_nothing(report, spectra):
    html = page(report, spectra)
    assert "@import" not in html and not re.search(r"url\((?!#)", html)
    for tag, attributes in Page(html).tags:
        assert tag not in {"script", "link", "img", "image", "iframe", "object", "embed"}
        assert not {name for name in attributes if name in {"src", "href"} or name.startswith("on")}
        assert str(attributes.get("xlink:href", "#")).startswith("#")
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
    assert all(len(svg) for svg in _drawings(html))
    report["samples"][0]["sliced"] = ""
    assert NASTY in _terminal(report, 200)


def test_the_curve_of_recovery_is_drawn_where_there_was_one(report, spectra):
    said = Page(page(report, spectra, draw=False)).text
    assert "perplexity 80.25 before, 61.50 after; 310 tokens a second" in said
    assert "recovery" in [d.name for d in pages.figures(checked(Report, report, "r"), {})]
    report["recover"] = {**report["recover"], "curve": []}
    assert "recovery" not in [d.name for d in pages.figures(checked(Report, report, "r"), {})]


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
        changed = {**copy.deepcopy(few(report)), key: gaps[key]}
        drawn = key in {"exactness", "widths", "dims", "kinds", "recover"}
        Page(page(changed, {"mlp.0": [3.0, 1.0]}, draw=drawn))
        _terminal(changed)


def test_drawings_are_well_formed_named_and_light(report, spectra):
    drawings = _drawings(page(report, spectra))
    assert len(drawings) == 1 + 1 + 2 + 2  # errors, recovery, widths and spectra of two kinds
    for svg in drawings:
        assert svg.get("aria-label") and svg.get("role") == "img"
        text = ElementTree.tostring(svg, encoding="unicode")
        assert not re.search(r"var\(--|oklch|color-mix", text)  # other programs draw it too
        paths = [p.get("d", "") for p in svg.iter(f"{SVG}path")]
        assert all(path.count("\nL") <= POINTS for path in paths)


def test_figures_are_files_the_same_to_the_byte_with_text_as_text(report, spectra, tmp_path):
    told = checked(Report, few(report), "report.json")
    drawn = {name: spectra[name] for name in ("x.0.0", "mlp.0")}
    for name in ("a", "b"):
        drawing.write(tmp_path / name, pages.figures(told, drawn))
    names = {p.name for p in (tmp_path / "a").iterdir()}
    stems = {"exactness", "recovery", *(f"{w}-{k}" for w in ("widths", "spectra") for k in KINDS)}
    assert names == {f"{stem}.{kind}" for stem in stems for kind in ("svg", "pdf")}
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    svg = ElementTree.parse(tmp_path / "a" / "widths-mlp.svg").getroot()
    said = ["".join(t.itertext()) for t in svg.iter(f"{SVG}text")]
    assert {"Widths of the MLP", "block", "width"} <= set(said)


KINDS = ("residual", "mlp")


def test_bars_and_curves_say_their_numbers_on_hover(report, spectra):
    titles = [t.text for svg in _drawings(page(report, spectra)) for t in svg.iter(f"{SVG}title")]
    assert "mlp.3: 1024 of 1536 kept" in titles
    assert any(t and t.startswith("x.0.1: 432 of 576 directions kept, 99.") for t in titles)


@pytest.mark.parametrize(
    ("values", "top"),
    [
        ([10, 11, 12, 13, 14, 900], 14),
        ([30, 35, 40, 45, 60, 150, 500, 3000, 20000], 150),
        ([10, 20, 40, 80, 160], None),  # evenly spread: a logarithmic axis shows all
        ([10, 10.1, 10.2, 12], None),  # nothing is flattened by 12
        ([10, 11, 900, 1000], None),  # half of them are not a few
        ([10, 900], None),
    ],
)
def test_what_flattens_the_rest_is_cut_off_and_nothing_else(values, top):
    found = drawing.ceiling([float(v) for v in values])
    assert found is None if top is None else found == pytest.approx(top)


def test_an_axis_is_logarithmic_where_values_differ_much():
    def scale(*values: float) -> str:
        points = [Point(float(n), v) for n, v in enumerate(values)]
        made = curves("a", "a", "", {"s": points}, ("x", "y"))
        return made.figure.axes[0].get_yscale()

    assert scale(10, 20, 40, 80, 160) == "log" and scale(10, 12, 14, 16) == "linear"


def test_tables_have_captions_and_headers(report, spectra):
    tags = Page(page(report, spectra, draw=False)).tags
    names = [tag for tag, _ in tags]
    assert names.count("caption") == names.count("table") == 4  # sizes, perplexity, samples, time
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
    text = Page(page(report, spectra, draw=False)).text
    assert verdict in text and "failed" in text and "certified" not in text
    assert verdict in " ".join(_terminal(report).split())


def test_the_terminal_states_the_golden_facts(report):
    lines = [re.sub(r"[│\s]+", " ", line).strip() for line in _terminal(report).splitlines()]
    for row in (
        "parameters 134.5M 107.6M 0.80×",
        "blocks + shortcuts 106.2M 86.4M 0.81×",
        "perplexity, sotu 45.50 78.75 1.73×",
        "perplexity, sotu, recovered 45.50 60.50 1.33×",
        "tokens per second 812 903 1.11×",
        "have a history have been have seen",
        "checkpoint runs/a run/model",
        "report runs/a run/report.html",
    ):
        assert row in lines


def test_nothing_is_cut_off_on_a_narrow_terminal(report):
    name = "a_name_of_data_that_is_longer_than_what_a_narrow_terminal_has_room_for"
    report["perplexity"] = {name: report["perplexity"]["sotu"]}
    said = _terminal(report, 44)
    assert "…" not in said and name in re.sub(r"[^\w]", "", said).replace("perplexity", "")


def test_what_was_read_and_what_was_left_whole_is_said(report):
    report["data"] = {
        "calibration": [
            {"name": "b", "data": "b.txt", "sequences": 8, "tokens": 2048, "start": NASTY}
        ],
        "training": [],
    }
    report["dims"]["vo.0"] = report["widths"]["vo.0"] = 64
    text = Page(page(report, {}, draw=False)).text
    assert "Texts that were read." in text and "2,048" in text and NASTY in text
    assert "Left whole: value/output heads: 64 of 64 in 1 space." in text
    drawn = pages.figures(checked(Report, report, "r"), {})
    assert not [d for d in drawn if "vo" in d.name] and [d for d in drawn if "mlp" in d.name]


def test_a_key_that_is_shown_is_a_row_of_page_terminal_and_comparison(report):
    report["predicted_seconds"] = {"dense": 0.5, "sliced": 0.25}
    assert ["predicted latency", "500.0\xa0ms", "250.0\xa0ms", "0.50×"] in [
        row.cells for row in checked(Report, report, "r").costs()
    ]
    assert "predicted latency" in page(report, {}, draw=False) and "predicted latency" in _terminal(
        report
    )


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"widths": {"mlp.0": "wide"}}, "widths.mlp.0: "),
        ({"model": {"stock": True}}, "model.name: is missing"),
        ({"parameters": {"dense": {"total": 1}}}, "parameters.dense.embedding: is missing"),
        ({"perplexity": {"a": {"sliced": "low"}}}, "perplexity.a.sliced"),
        ({"tasks": 3}, "tasks: "),
    ],
)
def test_a_damaged_report_is_refused_with_file_and_key(report, tmp_path, change, told):
    file = tmp_path / "report.json"
    file.write_text(json.dumps(report | {"recover": None} | change))
    with pytest.raises(InputError) as e:
        read(file)
    assert str(file) in str(e.value) and told in str(e.value)
    file.write_text(json.dumps(report | {"recover": None, "not known": 3}))
    assert read(tmp_path).version == "0.1.0"  # the control; keys of later versions do no harm


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "[1]", '{"x.0": [1, "a"]}', '{"x.0": 3}'])
def test_damaged_spectra_are_refused_with_their_file(tmp_path, text):
    (tmp_path / "spectra.json").write_text(text)
    with pytest.raises(InputError, match=r"spectra\.json"):
        read_spectra(tmp_path)
    (tmp_path / "spectra.json").write_text('{"x.0": [1, null]}')
    assert math.isnan(read_spectra(tmp_path)["x.0"][1])


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([f"mlp.{n}" for n in range(30)], "mlp.0–29"),
        (["mlp.0", "mlp.1", "mlp.7"], "mlp.0–1, 7"),
        ([f"x.{n}.{s}" for n in range(3) for s in (0, 1)] + ["x.3.0"], "x.0–3.0, x.0–2.1"),
        (["stream"], "stream"),
    ],
)
def test_spaces_that_are_alike_are_one_name(names, said):
    assert span(names) == said


def test_rows_that_say_the_same_are_one():
    rows = [["mlp.0", "8"], ["qk.0", "4"], ["mlp.1", "8"], ["mlp.2", "6"]]
    assert folded(rows) == [["mlp.0–1", "8"], ["qk.0", "4"], ["mlp.2", "6"]]


@pytest.mark.parametrize(
    ("spec", "said"),
    [("pca", "pca"), ({"pca": {"of": "raw"}}, "pca(of: raw)"), (None, ""), ({"a": {}}, "a")],
)
def test_a_method_with_options_stands_on_one_line(spec, said):
    assert method(spec) == said


def test_tables_for_papers_escape_what_names_hold():
    made = Grid("50 % of a_b", ["run", "perplexity"], [["x & y\\z", "45.50 ± 0.12"]]).latex()
    assert r"50 \% of a\_b" in made and r"x \& y\textbackslash{}z & 45.50 $\pm$ 0.12 \\" in made
    assert made.count(r"\begin") == made.count(r"\end") == 2 and "{lr}" in made
    assert latex("#$^~<>{}") == (
        r"\#\$\textasciicircum{}\textasciitilde{}\textless{}\textgreater{}\{\}"
    )
    assert latex("-0.02 ± 0.10 (-3) of a-1 ≤ 2") == (r"$-$0.02 $\pm$ 0.10 ($-$3) of a-1 $\leq$ 2")


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
    assert units.count(value, largest) == said


def test_a_predicted_loss_stands_beside_the_measured_one(report, spectra):
    assert "Predicted" not in page(report, spectra, draw=False)
    report["predicted"] = {"loss": 0.25, "by": "gradients", "measured": 0.3125}
    assert "Predicted to second order, by gradients of the dense model: +0.250" in page(
        report, spectra, draw=False
    )
    assert "+0.250 nats per token; measured, on the first of these data: +0.312" in page(
        report, spectra, draw=False
    )
    report["predicted"]["measured"] = None
    assert "+0.250 nats per token." in page(report, spectra, draw=False)


def test_every_key_that_is_read_is_documented():
    docs = (Path(__file__).parents[2] / "docs" / "reports.md").read_text()
    keys = [line.split("|")[1] for line in docs.splitlines() if line.startswith("| `")]
    known = {word for key in keys for word in re.findall(r"\w+", key)}
    assert set(Report.model_fields) <= known
    assert "not_a_key" not in known and {"widths", "perplexity"} <= known
