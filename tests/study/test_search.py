"""Searches: trials are proposed, remembered, resumed as if nothing had happened, and stopped early."""

# ruff: noqa: F401, F811 - fixtures are imported, and named by arguments

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from folders import invoke, save_tokens
from studies import BASE, ablate, no_model_in_memory, root, write

from invariance.compress.predict import Lost
from invariance.core.errors import InputError
from invariance.core.progress import quiet
from invariance.study import job as study_job
from invariance.study import search as study_search
from invariance.study.ablate import Ablation, folder_of
from invariance.study.plan import Planner, samples
from invariance.study.runners import here
from invariance.study.study import load_study

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
    over = "over: {steps.0.select.uniform.width: {low: 24, high: 40}}"
    text = f"{BASE}search: {{{over}, trials: 7, sampler: nsga2, seed: 1, minimize: [perplexity]}}\n"
    rows, said = ablate(root, text, "impossible")
    found = {r["steps.0.select.uniform.width"]: r for r in rows}
    assert {width <= 32 for width in found} == {True, False}
    assert "is more than the 32 directions" in " ".join(said.split())  # wherever lines break
    for width, row in found.items():
        assert row["status"] == ("done" if width <= 32 else "failed")
        assert width <= 32 or f"width {width} is more than the 32 directions" in row["reason"]
    assert "is more than the 32 directions" in (root / "impossible" / "results.csv").read_text()
    assert ablate(root, text, "impossible")[0] == rows


def test_a_search_of_which_no_trial_can_be_run_fails(root: Path) -> None:
    over = "over: {steps.0.select.uniform.width: {low: 32, high: 100000}}"
    text = f"{BASE}search: {{{over}, trials: 1, seed: 2, minimize: [perplexity]}}\n"
    (row,), said = ablate(root, text, "nothing", status=1)
    assert row["status"] == "failed" and "is more than the 32 directions" in row["reason"]
    assert "no trial could be run" in said


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (("[pca, random_orthogonal]", "[pca, hadamrd]"), "did you mean 'hadamard'?"),
        (("[pca, random_orthogonal]", "[pca, head_svd]"), "steps.0.rotate = head_svd"),
        (("ROOT/model", "ROOT/absent"), "absent"),
        (("low: 8, high: 32", "low: 33, high: 40"), "width 33 is more than the 32 directions"),
    ],
)
def test_what_no_trial_can_have_is_refused_before_anything_runs(
    root: Path, wrong: tuple[str, str], said: str
) -> None:
    text = f"{BASE}search: {{{OVER}, trials: 2}}\n".replace(*wrong)
    folder = root / said[:8]
    for flags in ([], ["--dry-run"]):
        status, _, err = invoke("ablate", write(root, text), "--output", folder, *flags)
        assert status == 2 and said in " ".join(err.split()) and not folder.exists(), err


@pytest.mark.parametrize(
    ("minimize", "evaluate", "said"),
    [
        ("[perplexity.typo.sliced]", True, "did you mean"),
        (
            "[perplexity.held out.recovered]",
            True,
            "no run will have numbers called 'perplexity.held out.recovered'",
        ),
        ("[perplexity]", False, "add `evaluate` to the base"),
        ("[parameters.blocks]", True, "did you mean 'parameters_blocks'?"),
    ],
)
def test_columns_that_no_trial_will_have_are_refused(
    root: Path, minimize: str, evaluate: bool, said: str
) -> None:
    text = f"{BASE}search: {{{OVER}, trials: 2, minimize: {minimize}}}\n"
    text = text if evaluate else "".join(li for li in text.splitlines(True) if "evaluate" not in li)
    status, _, err = invoke("ablate", write(root, text), "--output", root / "columns")
    assert status == 2 and said in " ".join(err.split()) and not (root / "columns").exists(), err


def test_a_first_trial_without_what_is_minimized_stops_the_search(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Lost, "nats", math.nan)  # as where a cut overflows
    text = f"{BASE}search: {{{OVER}, trials: 3, minimize: [predicted_loss]}}\n"
    for _ in range(2):
        status, _, err = invoke("ablate", write(root, text), "--output", root / "lacking")
        assert status == 2 and "the first run has no 'predicted_loss'" in " ".join(err.split()), err
        assert len(list((root / "lacking" / "runs").iterdir())) == 1


def test_a_run_that_is_done_has_not_failed_whatever_its_values(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f"{BASE}search: {{{OVER}, trials: 2, minimize: [perplexity]}}\n"
    with monkeypatch.context() as patch:
        patch.setattr(study_search, "math", SimpleNamespace(isfinite=lambda value: False))
        rows, _ = ablate(root, text, "infinite")
    assert {r["status"] for r in rows} == {"done"} and ablate(root, text, "infinite")[0] == rows


def test_a_search_that_prunes_runs_in_this_process_alone(root: Path) -> None:
    text = f"{BASE}search: {{{OVER}, trials: 2, minimize: [perplexity], prune: true}}\n"
    ablation = Ablation(load_study(write(root, text)), root / "alone", study_job.Execution())
    for arguments in ((2, False), (1, True)):
        with pytest.raises(InputError, match="one trial at a time, in this process"):
            study_search.opened(ablation, *arguments)
    assert not (root / "alone").exists()


def test_as_many_trials_as_workers_are_sent_at_a_time(root: Path) -> None:
    text = f"{BASE}search: {{{OVER}, trials: 5}}\n"
    execution = study_job.Execution()
    ablation = Ablation(load_study(write(root, text)), root / "sent", execution, lambda line: None)
    sent, run = [], here(execution)

    def counted(requests: Any) -> Any:
        sent.extend([len(requests)] if not requests[0].prepares else [])
        return run(requests)

    study_search.search(ablation, study_search.opened(ablation, 3, True), counted, 3, quiet)
    assert sent == [3, 2]


def test_alternatives_that_go_with_some_others_only_are_left_to_the_search(root: Path) -> None:
    over = "over: {steps.0.spaces: [mlp, residual], steps.0.rotate: [pca, permute]}"
    (root / "some.yaml").write_text(
        f"{BASE}search: {{{over}, trials: 2}}\n".replace("ROOT", str(root))
    )
    job, *_ = samples(Planner(study_job.Execution()), load_study(root / "some.yaml"))
    assert [*job.variants[0].varied.values()] != ["mlp", "pca"]


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
    assert all(
        "stopped early: perplexity 50.00" in r["reason"] for r in rows if r["status"] == "pruned"
    )


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
        name: (root / changed / name).read_bytes()
        for name in ("study.yaml", "results.csv", "study.html")
    }
    with pytest.raises(AssertionError, match="are of another search"):
        ablate(root, other, changed, *arguments)
    assert kept == {name: (root / changed / name).read_bytes() for name in kept}
    more, _ = ablate(root, text.replace("trials: 2", "trials: 3"), changed)  # this may change
    assert facts(more)[: len(rows)] == facts(rows)


@pytest.mark.parametrize("changed", ["data", "speed"])
def test_trials_that_would_be_measured_otherwise_now_are_refused_and_stay(
    root: Path, changed: str
) -> None:
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


def test_trials_that_cannot_be_read_are_refused_and_stay(root: Path) -> None:
    folder_of(root / "damaged").begin()
    path = root / "damaged" / study_search.STORAGE
    path.write_bytes(b"SQLite format 3\0" + b"junk" * 500)
    with pytest.raises(AssertionError, match="trials of the search cannot be read"):
        ablate(root, f"{BASE}search: {{{OVER}, trials: 2}}\n", "damaged")
    assert path.read_bytes().endswith(b"junk")
