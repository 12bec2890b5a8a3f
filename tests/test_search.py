"""Searches: trials are proposed, remembered, resumed as if nothing had happened, and stopped early."""

# ruff: noqa: F401, F811 - fixtures are imported, and named by arguments

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from folders import save_tokens
from test_ablate import BASE, ablate, no_model_in_memory, root, write

from invariance import study_job, study_search
from invariance.study import load_study

optuna = pytest.importorskip("optuna")

OVER = "over: {steps.0.select.uniform.width: {low: 8, high: 32}, steps.0.rotate: [pca, random_orthogonal]}"
COLUMNS = ("steps.0.select.uniform.width", "steps.0.rotate", "run", "perplexity")


def facts(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [tuple(r.get(c) for c in COLUMNS) for r in rows]


def test_a_search_that_is_interrupted_goes_on_as_if_it_had_not_been(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f"{BASE}search: {{{OVER}, trials: 6, sampler: tpe, seed: 3}}\n"
    monkeypatch.setattr(study_search, "FIRST", 2)
    whole, _ = ablate(root, text, "whole")
    real, calls = study_job.Bench.run, []

    def killed(self: Any, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, *args)

    with monkeypatch.context() as patch, pytest.raises(AssertionError):  # exit status 130
        patch.setattr(study_job.Bench, "run", killed)
        ablate(root, text, "parts")
    rows, said = ablate(root, text, "parts")
    assert facts(rows) == facts(whole)
    assert said.count("perplexity ") == len({r["run"] for r in rows}) - 3
    again, said = ablate(root, text, "parts")
    assert facts(again) == facts(whole) and "perplexity " not in said


def test_trials_whose_recipe_cannot_be_count_and_do_not_stop_the_search(root: Path) -> None:
    text = (
        BASE
        + "search: {over: {steps.0.select.uniform.width: [24, 99]}, trials: 4, sampler: nsga2, minimize: [perplexity]}\n"
    )
    rows, said = ablate(root, text, "impossible")
    assert [r["steps.0.select.uniform.width"] for r in rows] == [
        24
    ] and "width 99 is more than the 32 directions" in said


def test_a_trial_that_is_worse_than_the_median_early_is_stopped(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = iter([5.0] * 6 + [50.0] * 6)
    real = study_job.perplexity
    monkeypatch.setattr(study_job, "perplexity", lambda *args: next(values))
    assert real is not study_job.perplexity
    text = BASE + f"search: {{{OVER}, trials: 8, minimize: [perplexity], prune: true, seed: 1}}\n"
    rows, _ = ablate(root, text, "pruned")
    status = [r["status"] for r in rows]
    assert "done" in status and "pruned" in status
    assert all("stopped early: perplexity 50.00" in r["reason"] for r in rows if r["status"] == "pruned")


@pytest.mark.parametrize("changed", ["over", "minimize", "base"])
def test_trials_of_another_search_are_not_taken_for_this_ones(root: Path, changed: str) -> None:
    text = f"{BASE}search: {{{OVER}, trials: 2, minimize: [perplexity, parameters]}}\n"
    rows, _ = ablate(root, text, changed)
    other = {
        "over": text.replace("high: 32", "high: 31"),
        "minimize": text.replace("[perplexity, parameters]", "[perplexity]"),
        "base": text,
    }[changed]
    arguments = ("--set", "seed=7") if changed == "base" else ()
    kept = {
        name: (root / changed / name).read_bytes() for name in ("study.yaml", "results.csv", "study.html")
    }
    with pytest.raises(AssertionError, match="are of another search"):
        ablate(root, other, changed, *arguments)
    assert kept == {name: (root / changed / name).read_bytes() for name in kept}
    more, _ = ablate(root, text.replace("trials: 2", "trials: 3"), changed)  # this may change
    assert facts(more)[: len(rows)] == facts(rows)


@pytest.mark.parametrize("changed", ["data", "speed"])
def test_trials_that_would_be_measured_otherwise_now_are_refused_and_stay(root: Path, changed: str) -> None:
    text = f"{BASE}search: {{{OVER}, trials: 2}}\n".replace("test.npy", "touched.npy")
    save_tokens(root / "touched.npy", seed=1)
    folder = root / f"otherwise {changed}"
    ablate(root, text, folder.name)
    kept = {p: p.read_bytes() for p in folder.iterdir() if p.is_file() and p.suffix != ".db"}
    if changed == "data":
        save_tokens(root / "touched.npy", seed=2)
    else:
        text += "speed: true\n"
    with pytest.raises(AssertionError, match="were measured otherwise"):
        ablate(root, text, folder.name)
    assert len(kept) >= 4 and kept == {p: p.read_bytes() for p in kept}


def test_steps_of_a_range_are_kept_to(root: Path) -> None:
    over = "over: {evaluate.0.perplexity.sequences: {low: 1, high: 3, step: 2}, budget.parameters: {low: 1, high: 2, step: 0.5}}"
    searched = load_study(write(root, f"{BASE}search: {{{over}, trials: 1}}\n")).searched
    assert [f.range is not None and f.range.whole for f in searched] == [True, False]
