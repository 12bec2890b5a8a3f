"""Studies that run on a tiny model: what is shared is computed once, what fails fails alone, nothing is done twice."""

# ruff: noqa: F401, F811 - fixtures are imported, and named by arguments

from __future__ import annotations

import csv
import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from folders import invoke, save_model, save_tokens
from studies import BASE, ablate, no_model_in_memory, root, write

from invariance.calibrate import fisher, walk
from invariance.calibrate.moments import Moment, Moments, Store
from invariance.calibrate.statistic import Statistic
from invariance.compress import calibration, exactness
from invariance.compress.planner import plan
from invariance.core.errors import InputError
from invariance.core.group import Group
from invariance.core.space import Space
from invariance.io.data import load_tokens
from invariance.io.memo import Memo
from invariance.io.models import load_model
from invariance.measure import evaluate
from invariance.method.interfaces import find
from invariance.model.verify import relative_error, tolerance
from invariance.recipe.recipe import Recipe, load_recipe
from invariance.report.document import Report
from invariance.report.reading import checked
from invariance.study import job as study_job
from invariance.study import log as study_log
from invariance.study import table as study_table
from invariance.study.runners import Runner, Several
from invariance.study.table import NUMBERS, WORDS

STUDY = (
    BASE
    + """\
grid:
  steps.0.rotate: [pca, {pca: {of: normed}}, random_orthogonal]
  steps.0.select.uniform.width: [16, 24]
"""
)
FACTS = ("parameters", "flops", "kv_bytes", "perplexity", "ratio", "exactness")


@pytest.fixture(scope="module")
def done(root: Path) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """A study's rows, and how often each expensive thing was computed."""
    study_job._BENCHES.clear()
    counts: dict[str, int] = {}

    def counted(name: str, function: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            counts[name] = counts.get(name, 0) + 1
            return function(*args, **kwargs)

        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(walk, "oneshot", counted("calibration", walk.oneshot))
        patch.setattr(exactness, "certify", counted("certificate", exactness.certify))
        patch.setattr(evaluate, "token_losses", counted("evaluation", evaluate.token_losses))
        pca = find("rotate", "pca")
        patch.setattr(pca, "fit", counted("eigendecomposition", pca.fit))
        rows, _ = ablate(root, STUDY, "first")
    return rows, counts


def test_what_runs_share_is_computed_once(done: Any) -> None:
    rows, counts = done
    assert len(rows) == 6 and all(r["status"] == "done" for r in rows)
    assert counts == {
        "calibration": 1,
        "eigendecomposition": 2,
        "certificate": 3,
        "evaluation": 1 + 6,
    }


def test_a_study_gives_what_its_recipes_give_alone(root: Path, done: Any) -> None:
    row = done[0][3]
    recipe = root / "first" / "runs" / row["run"] / "recipe.yaml"
    status, out, err = invoke("run", recipe, "--output", root / "alone", "--json")
    assert status == 0, err
    report = json.loads(out)
    alone = report["perplexity"]["held out"]["sliced"]
    assert alone == pytest.approx(row["perplexity"], rel=1e-6)  # float32, another walk
    assert report["exactness"]["relative_error"] == row["exactness"]
    assert report["parameters"]["sliced"]["total"] == row["parameters"]


def test_widths_tell_runs_apart_and_rotations_share_certificates(done: Any) -> None:
    rows, _ = done
    by = {(r["steps.0.rotate"], r["steps.0.select.uniform.width"]): r for r in rows}
    assert len({r["perplexity"] for r in rows}) == 6
    for rotate in ("pca", "pca(of=normed)", "random_orthogonal"):
        assert by[rotate, 16]["exactness"] == by[rotate, 24]["exactness"] > 0
        assert by[rotate, 16]["parameters"] < by[rotate, 24]["parameters"]
    assert len({r["exactness"] for r in rows}) == 3


def test_results_are_one_tidy_row_a_run(root: Path, done: Any) -> None:
    rows, _ = done
    table = pyarrow.parquet.read_table(root / "first" / "results.parquet").to_pylist()
    assert [{k: r[k] for k in FACTS} for r in table] == [{k: r[k] for k in FACTS} for r in rows]
    with (root / "first" / "results.csv").open() as file:
        read = list(csv.DictReader(file))
    assert [float(r["perplexity"]) for r in read] == [r["perplexity"] for r in rows]
    wanted = {
        "run",
        "steps.0.rotate",
        "status",
        "reason",
        "predicted_loss",
        "measured_loss",
        "seconds",
        "version.torch",
        "perplexity.held out.dense",
        "perplexity.held out.sliced",
        "parameters_dense",
    }
    assert wanted <= set(read[0])


def test_run_again_nothing_is_computed_and_widened_only_what_is_new(root: Path, done: Any) -> None:
    folders = {p: p.stat().st_mtime_ns for p in (root / "first" / "runs").iterdir()}
    rows, said = ablate(root, STUDY, "first")
    assert [r["run"] for r in rows] == [r["run"] for r in done[0]] and "perplexity" not in said
    wider, said = ablate(root, STUDY.replace("[16, 24]", "[16, 20, 24]"), "first")
    assert len(wider) == 9 and said.count("perplexity ") == 3
    after = {p: p.stat().st_mtime_ns for p in (root / "first" / "runs").iterdir()}
    assert len(after) == 9 and after.items() >= folders.items()


def test_a_run_that_fails_says_why_and_the_others_go_on(root: Path) -> None:
    text = (
        BASE
        + "grid: {calibrate.data: [ROOT/tokens.npy, ROOT/absent.npy], steps.0.select.uniform.width: [16, 24]}\n"
    )
    rows, said = ablate(root, text, "failing", status=1)
    assert [r["status"] for r in rows] == ["done", "done", "failed", "failed"]
    assert (
        all("absent.npy: there is no such file" in r["reason"] for r in rows[2:])
        and "2 of 4 runs failed" in said
    )
    save_tokens(root / "absent.npy", seed=3)
    again, said = ablate(root, text, "failing")
    assert [r["status"] for r in again] == ["done"] * 4 and said.count("perplexity ") == 2
    (root / "absent.npy").unlink()


def test_a_fault_in_a_method_is_a_failed_run_with_its_traceback_kept(root: Path) -> None:
    (root / "faulty.py").write_text("""
from dataclasses import dataclass
from invariance import Group, Rotator
@dataclass(frozen=True)
class Faulty(Rotator, name="faulty_for_a_test"):
    produces = Group.ORTHOGONAL
    def fit(self, space, moments):
        return 1 / 0
""")
    text = BASE + "grid: {steps.0.rotate: [faulty_for_a_test, pca]}\n"
    rows, _ = ablate(root, text, "faulty", "--plugin", root / "faulty.py", status=1)
    assert [r["status"] for r in rows] == ["failed", "done"] and "ZeroDivisionError" in rows[0][
        "reason"
    ]
    assert "line 8, in fit" in (root / "faulty" / "failed" / f"{rows[0]['run']}.txt").read_text()
    (root / "faulty.py").write_text((root / "faulty.py").read_text() + "\n# another method now\n")
    assert (
        rows[1]["run"]
        == ablate(root, text, "faulty", "--plugin", root / "faulty.py", status=1)[0][1]["run"]
    )


def test_two_recipes_that_are_one_run_once(root: Path) -> None:
    text = BASE + "grid: {pair: {a: {seed: 0}, b: {order: oneshot}}}\n"
    rows, said = ablate(root, text, "same")
    assert len(rows) == 2 and rows[0]["run"] == rows[1]["run"] and said.count("perplexity ") == 1


def on_ray(requests: Sequence[study_job.Request]) -> Iterator[study_job.Answer]:
    """What a Ray cluster answers, asked in a process of its own; where Ray cannot start there thrice, the test is skipped."""
    script = Path(__file__).parent.parent / "on_ray.py"
    for _ in range(3):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "requests.json"
            file.write_text(json.dumps([(r.name, r.recipes) for r in requests]))
            done = subprocess.run(
                [sys.executable, script, file], capture_output=True, text=True, check=False
            )
            if done.returncode < 0 or "ray::core::" in done.stderr:  # by a signal, or a fault there
                continue
            assert done.returncode == 0, done.stderr[-3000:]
            for answer in json.loads(file.read_text()):
                request = study_job.Request(answer["request"]["name"], ())
                yield study_job.Answer(request, answer["report"], reason=answer["reason"])
            return
    pytest.skip(f"Ray's native code does not start here: {done.stderr[:1000]}")


@pytest.fixture(params=["several", "ray"])
def elsewhere(request: pytest.FixtureRequest) -> Runner:
    """Carries requests out in processes of their own."""
    if request.param == "several":
        return Several(study_job.Execution(threads=1), workers=2)
    pytest.importorskip("ray")
    return on_ray


def test_processes_of_their_own_give_the_numbers_of_this_one(
    root: Path, done: Any, elsewhere: Runner
) -> None:
    rows = {row["run"]: row for row in done[0][:2]}
    recipes = {
        run: load_recipe(root / "first" / "runs" / run / "recipe.yaml").to_dict() for run in rows
    }
    broken = study_job.Request(
        "broken", ({**recipes[done[0][0]["run"]], "model": str(root / "nowhere")},)
    )
    requests = [study_job.Request(run, (recipe,)) for run, recipe in recipes.items()]
    answers = {answer.request.name: answer for answer in elsewhere([*requests, broken])}
    assert "nowhere" in (answers.pop("broken").reason or "")
    assert answers.keys() == rows.keys()
    for run, answer in answers.items():
        assert answer.report is not None, answer.reason
        found = study_table.row(run, {}, checked(Report, answer.report, run), study_table.DONE)
        assert [found[k] for k in FACTS] == [rows[run][k] for k in FACTS]


def test_a_cluster_that_does_not_answer_is_refused(root: Path) -> None:
    pytest.importorskip("ray")
    status, _, err = invoke(
        "ablate", write(root, STUDY), "--output", root / "nobody", "--ray", "127.0.0.1:1"
    )
    assert (
        status == 2
        and "--ray 127.0.0.1:1" in err
        and "Give HOST:PORT" in err
        and "Traceback" not in err
    )
    assert not (root / "nobody" / "runs").exists()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_killed_in_the_middle_at_most_the_run_in_hand_is_lost(root: Path, done: Any) -> None:
    arguments = ("ablate", write(root, STUDY, "killed.yaml"), "--output", root / "killed")
    process = multiprocessing.get_context("fork").Process(target=invoke, args=arguments)
    process.start()
    runs = root / "killed" / "runs"
    while process.is_alive() and not (runs.is_dir() and len(whole(runs)) >= 2):
        time.sleep(0.01)
    process.kill()
    process.join()
    kept = whole(runs)
    stamps = {p: p.stat().st_mtime_ns for p in kept}
    assert 2 <= len(kept) < 6
    rows, said = ablate(root, STUDY, "killed")
    assert said.count("perplexity ") == 6 - len(kept)
    assert {p: p.stat().st_mtime_ns for p in kept} == stamps
    assert [{k: r[k] for k in FACTS} for r in rows] == [{k: r[k] for k in FACTS} for r in done[0]]


def whole(runs: Path) -> list[Path]:
    return [
        p for p in runs.iterdir() if (p / "report.json").is_file() and not p.name.startswith(".")
    ]


def test_ctrl_c_keeps_what_is_done_and_writes_the_results(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = study_job.Bench.run, []

    def interrupted(self: Any, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(study_job.Bench, "run", interrupted)
    status, _, err = invoke("ablate", write(root, STUDY), "--output", root / "stopped")
    assert status == 130 and "Traceback" not in err
    with (root / "stopped" / "results.csv").open() as file:
        assert [r["status"] for r in csv.DictReader(file)].count("done") == 2
    assert (root / "stopped" / "study.html").is_file()


def test_figures_and_a_table_for_papers_lie_in_the_folder(root: Path, done: Any) -> None:
    rows = done[0]
    names = {path.name for path in (root / "first" / "figures").iterdir()}
    assert {"front.svg", "front.pdf"} <= names and len(names) % 2 == 0
    status, _, err = invoke("ablate", write(root, STUDY), "--output", root / "first", "--latex")
    assert status == 0, err
    text = (root / "first" / "results.tex").read_text()
    lines = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len(lines) == 1 + len(rows) and lines[1].count(r"$\pm$") == 1
    assert f"{rows[0]['perplexity']:.2f} $" in lines[1]


def test_a_folder_that_is_no_studys_is_left_alone(root: Path) -> None:
    (root / "mine").mkdir()
    (root / "mine" / "thesis.txt").write_text("precious")
    status, _, err = invoke("ablate", write(root, STUDY), "--output", root / "mine")
    assert (
        status == 2
        and "no manifest.json says" in err
        and [p.name for p in (root / "mine").iterdir()] == ["thesis.txt"]
    )


def test_no_moment_sees_the_tokens_that_are_skipped(root: Path) -> None:
    model, counts = load_model(str(root / "model")), []
    ids = load_tokens(str(root / "tokens.npy"), None, vocab_size=41)
    for skip in (0, 2):
        recipe = Recipe.from_dict(
            {
                "model": str(root / "model"),
                "calibrate": {"data": str(root / "tokens.npy"), "dtype": "float32", "skip": skip},
                "steps": [
                    {"spaces": "residual", "rotate": "pca", "select": {"uniform": {"width": 24}}}
                ],
            }
        )
        store = root / f"moments {skip}"
        calibration.calibrate(model, [plan(recipe, model.config)], ids, store=store)
        (folder,) = store.iterdir()
        found = Store(folder).load([("x.0.0", Statistic.RAW)]).known["x.0.0", Statistic.RAW]
        x = (
            model.get_input_embeddings()(ids.ids[:, skip:]).flatten(0, 1).double()
        )  # the stream before the first stage
        assert found.count == len(x)
        assert relative_error(x.T @ x, found.total[0]) < tolerance(torch.float32, 0)
        counts.append(found.count)
    assert counts == [16 * 16, 16 * 14]


def test_no_gradient_of_skipped_tokens_is_in_the_fisher(root: Path) -> None:
    model, ids = (
        load_model(str(root / "model")),
        load_tokens(str(root / "tokens.npy"), None, vocab_size=41),
    )
    steps = [
        {
            "spaces": "qk",
            "rotate": {"rope_pairs": {"metric": "fisher"}},
            "select": {"uniform": {"width": 4}},
        },
        {
            "spaces": "mlp",
            "rotate": {"permute": {"metric": "fisher"}},
            "select": {"uniform": {"width": 8}},
        },
    ]
    found = {}
    for skip in (0, 6, 15):
        calibrate = {"data": str(root / "tokens.npy"), "dtype": "float32", "skip": skip}
        recipe = Recipe.from_dict(
            {"model": str(root / "model"), "calibrate": calibrate, "steps": steps}
        )
        store = root / f"gradients {skip}"
        calibration.calibrate(model, [plan(recipe, model.config)], ids, store=store)
        keys = [("x.1.0", Statistic.FISHER), ("qk.0", Statistic.TAYLOR)]
        found[skip] = [
            known.known[k]
            for k in keys
            for folder in store.iterdir()
            for known in [Store(folder).load([k])]
        ]
    for first, some, last in zip(*found.values(), strict=True):
        assert [m.count / last.count for m in (first, some)] == [16, 10]
        for more, fewer in ((first, some), (some, last)):  # what is left out was a sum of squares
            assert (
                torch.linalg.eigvalsh(more.total[0] - fewer.total[0]).min()
                > -1e-9 * more.total[0].trace()
            )
            assert more.total[0].trace() > fewer.total[0].trace() > 0


def test_axes_found_in_float32_are_exact_all_the_same() -> None:
    space = Space("x.0.0", "residual", 48, Group.ORTHOGONAL)
    x = torch.randn(
        400, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    ) * torch.arange(1, 49)
    moments = Moments({(space.name, Statistic.RAW): Moment((x.T @ x)[None], 400)})
    exact, single = (
        find("rotate", "pca")(precision=p).fit(space, moments) for p in ("float64", "float32")
    )
    assert space.contains(single.A) and not torch.equal(single.A.matrix(), exact.A.matrix())
    assert not space.contains(
        exact.A.matrix().float().double()
    )  # the control: float32 itself is not orthogonal enough
    aligned = (single.A.matrix() * exact.A.matrix()).sum(-2).abs()
    assert (1 - aligned).abs().max() < tolerance(torch.float32, 0)


def test_loggers_get_what_varies_and_what_was_measured(root: Path, done: Any) -> None:
    ablate(root, STUDY, "first", "--logger", "csv")
    logs = root / "first" / "logs" / "s" / done[0][0]["run"]
    with (logs / "metrics.csv").open() as file:
        (found,) = csv.DictReader(file)
    assert float(found["perplexity"]) == done[0][0]["perplexity"]
    assert "steps.0.select.uniform.width: 16" in (logs / "hparams.yaml").read_text()
    status, _, err = invoke(
        "ablate", write(root, STUDY), "--output", root / "first", "--logger", "tensorbord"
    )
    assert status == 2 and "did you mean 'tensorboard'?" in err


def test_a_logger_whose_package_is_not_there_is_refused_before_anything_runs(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_log, "find_spec", lambda name: None)
    for name in ("wandb", "mlflow", "tensorboard"):
        status, _, err = invoke(
            "ablate", write(root, STUDY), "--output", root / "logged", "--logger", name
        )
        assert status == 2 and "pip install" in err and not (root / "logged").exists()


def test_every_column_of_the_results_is_known_by_name(done: Any) -> None:
    factors = {"steps.0.rotate", "steps.0.select.uniform.width"}
    for name, value in done[0][0].items():
        head = name.split(".")[0]
        assert name in factors or (head in NUMBERS) != (head in WORDS), name
        assert head not in NUMBERS or value is None or isinstance(value, int | float), name


def test_what_a_run_holds_of_a_cluster_wants_one(root: Path) -> None:
    status, _, err = invoke("ablate", write(root, STUDY), "--output", root / "held", "--gpus", "1")
    assert status == 2 and "Add --ray" in err and not (root / "held").exists()


def test_tensorboard_is_written(root: Path, done: Any) -> None:
    pytest.importorskip("tensorboardX")
    ablate(root, STUDY, "first", "--logger", "tensorboard")
    assert list((root / "first" / "logs").glob("**/events.out.*"))


def test_a_memo_that_is_full_forgets_the_oldest_and_computes_it_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memo = Memo(limit=2)
    for key in ("a", "b", "a", "c", "b"):
        assert memo.once(key, lambda key=key: key * 2, lambda value: 1) == key * 2
    assert memo.computed == ["a", "b", "c", "b"]


def test_the_fisher_is_measured_once_for_all(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = fisher.measure
    monkeypatch.setattr(
        fisher, "measure", lambda *args, **keys: calls.append(1) or real(*args, **keys)
    )
    text = BASE + "grid: {steps.0.rotate: [output_aware, {output_aware: {tau: 2.0}}]}\n"
    ablate(root, text, "fisher")
    assert len(calls) == 1
