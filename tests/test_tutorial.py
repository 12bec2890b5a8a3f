"""The tutorials, done as they say on a tiny model: from one file to a plot, from an empty folder to a figure in a PDF."""

# ruff: noqa: F401, F811 - a fixture is imported, and named by arguments

from __future__ import annotations

import csv
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from folders import invoke, overrides, save_model, save_tokens
from pages import Page
from test_docs import blocks, commands, sandbox

from invariance.method import interfaces

PAGE = "docs/tutorial-ablation.md"


def test_the_tutorial_leads_from_one_file_to_a_plot(sandbox: Path) -> None:
    (code,) = [b.text for b in blocks("python") if b.page == PAGE]
    (study,) = [b.text for b in blocks("yaml") if b.page == PAGE]
    (sandbox / "my_selector.py").write_text(code)
    (sandbox / "valley.yaml").write_text(study)
    tiny = {
        "model": save_model(sandbox / "model", num_hidden_layers=3),
        "calibrate.data": save_tokens(sandbox / "t.npy"),
        "calibrate.sequences": 16,
        "calibrate.tokens": 16,
        "calibrate.dtype": "float32",
        "evaluate.0.perplexity.data": save_tokens(sandbox / "e.npy", seed=1),
        "evaluate.0.perplexity.sequences": 16,
        "evaluate.0.perplexity.tokens": 16,
    }
    sets = [word for assignment in overrides(tiny) for word in ("--set", assignment)]
    dry, real = ([*words[1:], *sets] for block, words in commands() if block.page == PAGE)
    status, out, err = invoke(*dry)
    assert status == 0 and "15" in out and not (sandbox / "runs").exists(), err
    status, out, err = invoke(*real)
    assert status == 0, err
    for depth in (
        "0.0",
        "-1.0",
        "3.0",
    ):  # whatever the option is, the loop ends where the budget is met
        (sandbox / "deep.yaml").write_text(study.replace("depth: 0.1", f"depth: {depth}"))
        deep = [word.replace("valley.yaml", "deep.yaml") for word in dry]
        status, out, err = invoke(*deep)
        assert status == 0 and "15" in out, err
    with (sandbox / "runs/valley/results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 15 and {r["status"] for r in rows} == {"done"}
    for budget in (
        "0.9",
        "0.8",
        "0.7",
    ):  # as the page says, there all have the same parameters, to one multiple
        spent = [
            int(r["parameters"]) / int(r["parameters_dense"])
            for r in rows
            if r["budget.parameters"] == budget
        ]
        assert len(spent) == 5 and max(spent) <= float(budget)
    said = Page((sandbox / "runs/valley/study.html").read_text()).text
    assert all(name in said for name in ("valley", "deep valley", "uniform", "influence", "energy"))
    again = invoke(*real)[2]
    assert "perplexity " not in again


FILES = {
    "toml": ["pyproject.toml"],
    "python": ["mean_free.py", "test_mean_free.py", "figure.py"],
    "yaml": ["recipe.yaml", "study.yaml"],
}


def installed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``pip install -e .`` does, but into a folder of the test's own."""
    quiet = ("-q", "--disable-pip-version-check", "--no-deps", "--no-build-isolation")
    pip = [sys.executable, "-m", "pip", "install", *quiet, "--target", str(root / "site"), "."]
    subprocess.run(pip, cwd=root, check=True)
    monkeypatch.syspath_prepend(str(root / "site"))
    monkeypatch.setattr(interfaces, "_loaded", False)  # entry points are looked up again


def run_tests_of(file: Path) -> int:
    """How many tests of a file were called, as pytest calls them."""
    tests = [f for n, f in runpy.run_path(str(file)).items() if n.startswith("test_")]
    for test in tests:
        test()
    return len(tests)


def test_the_tutorial_leads_from_an_empty_folder_to_a_figure_in_a_pdf(
    sandbox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for language, names in FILES.items():
        for name, block in zip(names, blocks(language, told=True), strict=True):
            (sandbox / name).write_text(block.text)
    text = {"sequences": 16, "tokens": 16}
    tiny = {
        "model": save_model(sandbox.parent / "model"),
        "calibrate.data": save_tokens(sandbox.parent / "t.npy"),
        "calibrate.dtype": "float32",
        "evaluate.0.perplexity.data": save_tokens(sandbox.parent / "e.npy", seed=1),
    }
    for key in ("calibrate", "evaluate.0.perplexity"):
        tiny |= {f"{key}.{name}": value for name, value in text.items()}
    sets = [word for assignment in overrides(tiny) for word in ("--set", assignment)]
    ran = []
    for _, (program, *words) in commands(told=True):
        ran.append(program)
        if program == "pip":
            installed(sandbox, monkeypatch)
        elif program == "pytest":
            assert run_tests_of(sandbox / "test_mean_free.py") == 2
        elif program == "python":
            runpy.run_path(str(sandbox / words[0]), run_name="__main__")
        else:
            status, _, err = invoke(*words, *(sets if words[0] != "methods" else []))
            assert status == 0, err
    assert ran == ["pip", *["invariance"], "pytest", *["invariance"] * 3, "python", "invariance"]
    assert (sandbox / "figure.pdf").read_bytes().startswith(b"%PDF")
    assert list((sandbox / "runs/study/figures").glob("*.pdf"))
    assert "mean-free" in (sandbox / "runs/study/results.tex").read_text()
    assert (sandbox / "runs/mean-free/model/config.json").is_file()
