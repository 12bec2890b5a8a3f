"""Reports side by side: ratios to the first, widths that differ, texts of the same prompt."""

# ruff: noqa: F401, F811 - a fixture is imported, and named by arguments

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
from folders import invoke
from pages import NASTY, Page, report


@pytest.fixture
def runs(tmp_path: Path, report: dict[str, Any]) -> list[Path]:
    other = copy.deepcopy(report)
    other["parameters"]["sliced"]["total"] //= 2
    other["perplexity"]["sotu"] |= {"sliced": 157.5, "recovered": None}
    other["widths"] |= {"mlp.3": 512, "mlp.4": 512}
    other["samples"][0] |= {"sliced": f" {NASTY}", "recovered": None}
    for name, found in (("a", report), ("b", other)):
        (tmp_path / name / "run").mkdir(parents=True)
        (tmp_path / name / "run" / "report.json").write_text(json.dumps(found))
    return [tmp_path / name / "run" for name in "ab"]


def test_numbers_widths_and_texts_stand_side_by_side(runs: list[Path]) -> None:
    status, out, err = invoke("compare", *runs, "--json")
    assert status == 0, err
    found = json.loads(out)
    assert found["runs"] == ["a/run", "b/run"]
    first, second = found["numbers"]["parameters"]
    assert second == first // 2
    assert found["numbers"]["perplexity, sotu"] == [78.75, 157.5]
    assert found["numbers"]["perplexity, sotu, recovered"] == [60.5, None]
    assert found["widths"] == {"mlp": {"mlp.3": [1024, 512], "mlp.4": [1032, 512]}}
    assert found["samples"] == {
        "The people": {
            "the dense model": " have a history",
            "a/run": " have seen",
            "b/run": f" {NASTY}",
        }
    }


def test_the_terminal_shows_ratios_to_the_first(runs: list[Path]) -> None:
    status, out, _ = invoke("compare", runs[0] / "report.json", runs[1])
    assert (
        status == 0
        and "157.50  2.00×" in out
        and "mlp.3" in out
        and "mlp.5" not in out
        and "".join(NASTY.split()) in re.sub(r"\s", "", out)
    )


def test_spaces_alike_share_a_line_and_those_that_do_not_differ_are_left_out(
    runs: list[Path],
) -> None:
    for run, narrow in ((runs[0], ()), (runs[1], (0, 1, 2, 4, 6, 7))):
        found = json.loads((run / "report.json").read_text())
        found["widths"] |= {f"mlp.{n}": 8 if n in narrow else 16 for n in range(9)}
        (run / "report.json").write_text(json.dumps(found))
    status, out, err = invoke("compare", *runs)
    assert status == 0, err
    lines = [line.split() for line in out.splitlines() if "mlp." in line]
    assert lines == [["mlp.0–2,", "4,", "6–7", "16", "8"]]


def test_other_bases_at_equal_widths_are_told_by_the_energy_that_is_cut(
    runs: list[Path], report: dict[str, Any], tmp_path: Path
) -> None:
    assert "Energy of a run" not in invoke("compare", *runs)[1]
    for run, energies in zip(runs, ([6.0, 2.0, 1.0, 1.0], [4.0, 3.0, 2.0, 1.0]), strict=True):
        kept = report["widths"] | {"mlp.3": 2, "mlp.4": 4}
        (run / "report.json").write_text(json.dumps(report | {"widths": kept}))
        (run / "spectra.json").write_text(json.dumps({"mlp.3": energies, "mlp.4": energies}))
    status, out, err = invoke("compare", *runs, "--json")
    assert status == 0, err
    found = json.loads(out)
    assert found["widths"] == {} and found["energy_cut"] == {
        "mlp": [
            [None, None, None, pytest.approx(0.2), 0.0],
            [None, None, None, pytest.approx(0.3), 0.0],
        ]
    }
    assert (
        invoke("compare", runs[0] / "report.json", runs[1], "--html", tmp_path / "e.html")[0] == 0
    )
    said = Page((tmp_path / "e.html").read_text()).text
    assert "Energy cut: MLP" in said and "as the run's own basis counts it" in said
    _, out, _ = invoke("compare", *runs)
    assert "10.00%" in out and "15.00%" in out


def test_the_page_holds_the_same_and_loads_nothing(runs: list[Path], tmp_path: Path) -> None:
    assert invoke("compare", *runs, "--html", tmp_path / "both.html")[0] == 0
    html = (tmp_path / "both.html").read_text()
    assert "<script>" not in html and "default-src 'none'" in html
    said = re.sub(r"\s+", " ", Page(html).text)
    assert "157.50 2.00×" in said and NASTY in said
    assert "Widths of the MLP" in said and html.count("<svg") == 1


def test_a_file_that_is_no_comparison_of_ours_is_never_written_over(
    runs: list[Path], tmp_path: Path
) -> None:
    for flag, others in (("--html", runs[0] / "report.json"), ("--latex", tmp_path / "paper.tex")):
        others.touch()
        before = others.read_bytes()
        status, _, err = invoke("compare", *runs, flag, others)
        assert status == 2 and "no page that we wrote" in " ".join(err.split())
        assert others.read_bytes() == before
        own = tmp_path / f"own{flag}"
        assert [invoke("compare", *runs, flag, own)[0] for _ in range(2)] == [0, 0]  # the control
    both = ("--html", tmp_path / "one", "--latex", tmp_path / "one")
    status, _, err = invoke("compare", *runs, *both)
    assert status == 2 and "the same file" in " ".join(err.split())
    assert not (tmp_path / "one").exists()


def test_a_table_for_papers_has_a_line_a_run_and_standard_errors(
    runs: list[Path], tmp_path: Path
) -> None:
    found = json.loads((runs[1] / "report.json").read_text())
    found["perplexity"]["sotu"]["extra_loss"] = {"sliced": {"value": 1.0, "standard_error": 0.01}}
    (runs[1] / "report.json").write_text(json.dumps(found))
    status, _, err = invoke("compare", *runs, "--latex", tmp_path / "both.tex")
    assert status == 0, err
    text = (tmp_path / "both.tex").read_text()
    lines = [line for line in text.splitlines() if line.startswith(("a/run", "b/run"))]
    assert len(lines) == 2 and r"157.50 $\pm$ 1.57" in lines[1] and r"$\pm$" not in lines[0]
    assert r"\toprule" in text and "perplexity, sotu" in text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "Give the folder that `invariance run` wrote"),
        ("{", "not valid JSON"),
        ("{}", "report.json: model: is missing"),
        ("[1]", "the whole file"),
        ('{"model": 3}', "report.json: model: "),
    ],
)
def test_what_is_no_report_is_refused(
    runs: list[Path], tmp_path: Path, text: str | None, said: str
) -> None:
    (tmp_path / "c").mkdir()
    if text is not None:
        (tmp_path / "c" / "report.json").write_text(text)
    status, _, err = invoke("compare", runs[0], tmp_path / "c")
    assert status == 2 and said in " ".join(err.split()) and "Traceback" not in err


def test_one_run_has_nothing_to_be_compared_with(runs: list[Path]) -> None:
    status, _, err = invoke("compare", runs[0])
    assert status == 2 and "two or more" in err
