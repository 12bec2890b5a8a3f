"""The tutorial on ablations, done as it says on a tiny model: one file, one study, one plot."""

# ruff: noqa: F401, F811 - a fixture is imported, and named by arguments

from __future__ import annotations

import csv
from pathlib import Path

from folders import invoke, overrides, save_model, save_tokens
from pages import Page
from test_docs import blocks, commands, sandbox

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
