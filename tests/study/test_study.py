"""Studies: what varies, in which runs, and what is told of a study that cannot be; none of them runs anything."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from folders import invoke
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from rich.console import Console
from transformers import AutoConfig

from invariance.compress.execution import Execution
from invariance.core.errors import InputError
from invariance.recipe.recipe import Recipe
from invariance.study.factors import short
from invariance.study.job import key
from invariance.study.plan import REPORT_BYTES, Planner, _own, outlook
from invariance.study.study import Study, Variant, load_study
from invariance.study.table import arrow, cost_axes, front, latex, terminal, write

STUDIES = sorted((Path(__file__).parents[2] / "recipes" / "ablations").glob("*.yaml"))
BASE = """\
base:
  model: m
  calibrate: {data: t.npy}
  steps:
    - {spaces: mlp, rotate: permute, select: {uniform: {keep: 0.5}}}
"""
GEMMA = {
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "vocab_size": 4096,
}
SHAPE: dict[str, Any] = {  # of the model that the shipped studies name, but for its depth
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 5,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 4096,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}


def study(tmp_path: Path, text: str, base: str = BASE) -> Study:
    file = tmp_path / "s.yaml"
    file.write_text(base + text)
    return load_study(file)


def test_a_grid_is_all_combinations_and_zipped_lists_go_with_each(tmp_path: Path) -> None:
    found = study(
        tmp_path,
        "grid: {seed: [0, 1], steps.0.select.uniform.keep: [0.5, 0.25, 0.75]}\n"
        "zip: {tie: [keep, untie], order: [oneshot, sequential]}\n",
    )
    rows = [tuple(v.varied.values()) for v in found.variants()]
    assert len(rows) == len(set(rows)) == 2 * 3 * 2
    assert {row[2:] for row in rows} == {("keep", "oneshot"), ("untie", "sequential")}
    assert [v.recipe.seed for v in found.variants()] == [row[0] for row in rows]


def test_a_group_of_keys_varies_together_under_its_label(tmp_path: Path) -> None:
    found = study(
        tmp_path,
        """\
grid:
  method:
    cut: {steps.0.rotate: fluctuation, steps.0.slice: bias_compensation, seed: 3}
    other: {steps: [{spaces: vo, rotate: head_svd}]}
""",
    )
    cut, other = found.variants()
    assert cut.varied == {"method": "cut"} and cut.recipe.seed == 3
    assert cut.recipe.steps[0].slice.name == "bias_compensation"
    assert [s.spaces for s in other.recipe.steps] == [("vo",)]


def test_an_option_set_in_a_study_takes_the_place_of_its_rival(tmp_path: Path) -> None:
    (variant,) = study(tmp_path, "grid: {steps.0.select.uniform.width: [8]}\n").variants()
    assert variant.recipe.steps[0].select.spec() == {"uniform": {"width": 8}}


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("grid: {sed: [0, 1]}", 6, "'sed' is no key of a recipe; did you mean 'seed'?"),
        ("grid:\n  seed: [0, 1, -1]", 7, "seed: got -1"),
        ("grid:\n  steps.0.rotat: [pca]", 7, "unknown key 'rotat'; did you mean 'rotate'?"),
        ("grid:\n  steps.0.rotate: [permute, permut]", 7, "did you mean 'permute'?"),
        ("grid:\n  m:\n    a: {sede: 1}", 8, "unknown key 'sede'; did you mean 'seed'?"),
        ("grid:\n  m: {a: 3}", 7, "so each of its labels takes the keys that it sets"),
        ("grid:\n  seed: []", 7, "write a list of values"),
        ("grid:\n  seed: [1, 1]", 7, "the value 1 stands twice"),
        ("gird: {seed: [1]}", 6, "unknown key 'gird'; did you mean 'grid'?"),
        (
            "zip: {seed: [0, 1], tie: [keep]}",
            6,
            "lists of different lengths: 'seed' has 2, 'tie' has 1",
        ),
        ("search: {over: {seed: {low: 3, high: 1}}}", 6, "`low` must be below `high`"),
        (
            "search: {over: {seed: [1, 2]}, trails: 3}",
            6,
            "unknown key 'trails'; did you mean 'trials'?",
        ),
        ("grid: {}", 6, "nothing varies"),
        ("search: {over: {}}", 6, "nothing varies"),
        ("grid: {seed: [1, 2]}\nx: sede", 7, "did you mean 'seed'?"),
        (
            "grid: {steps.0.rotate: [pca, permute]}\nx: steps.0.rotate",
            7,
            "no numbers of the results are called",
        ),
        ("grid: {seed: [1, 2]}\ny: [ratio.all, perplexty]", 7, "did you mean 'perplexity'?"),
        ("search: {over: {seed: [1, 2]}, minimize: [perplexty]}", 6, "did you mean 'perplexity'?"),
        (
            "search: {over: {seed: [1, 2]}, minimize: [status]}",
            6,
            "no numbers of the results are called 'status'",
        ),
        ("search: {over: {seed: [1, 2]}, minimize: [seconds_per_token]}", 6, "Add `speed: true`"),
        (
            "search: {over: {seed: [1, 2]}, prune: true}",
            6,
            "only a search that minimizes perplexity alone can be pruned",
        ),
    ],
)
def test_a_mistake_is_told_with_file_line_and_remedy(
    tmp_path: Path, text: str, line: int, said: str
) -> None:
    with pytest.raises(InputError) as e:
        study(tmp_path, text + "\n").variants()
    assert str(e.value).startswith(f"{tmp_path / 's.yaml'}:{line}") and said in str(e.value), str(
        e.value
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "grid:\n  seed: [0, 1]\n  m: {a: {seed: 5}}",
            "'m' sets seed and so undoes what 'seed' sets at seed",
        ),
        (
            "grid:\n  steps.0.rotate: [permute]\n  m: {a: {steps: []}}",
            "undoes what 'steps.0.rotate' sets at steps.0.rotate",
        ),
        ("grid: {seed: [0, 1]}\nzip: {seed: [2]}", "'seed' varies twice"),
        ("grid:\n  ratio: {a: {seed: 5}}", "the results have a column of that name"),
        ("grid:\n  perplexity.mine: {a: {seed: 5}}", "the results have a column of that name"),
    ],
)
def test_factors_that_undo_each_other_or_hide_a_column_are_refused(
    tmp_path: Path, text: str, said: str
) -> None:
    with pytest.raises(InputError) as e:
        study(tmp_path, text + "\n")
    assert said in str(e.value), str(e.value)


@pytest.mark.parametrize(
    "key", ["seed", "steps.0.rotate.permute.metric", "steps.0", "budget.parameters"]
)
def test_what_varies_is_not_set_for_all(tmp_path: Path, key: str) -> None:
    text = "grid: {seed: [0, 1], steps.0.rotate: [permute, pca], m: {a: {budget: {flops: 0.5}}}}\n"
    study(tmp_path, f"{text}set: {{tie: keep}}\n")
    with pytest.raises(InputError, match=f"--set {key}: '.*' varies"):
        load_study(tmp_path / "s.yaml", [f"{key}=1"])
    with pytest.raises(
        InputError, match=rf"s.yaml:7: set: {key}: '.*' varies .*, so runs would not have"
    ):
        study(tmp_path, f"{text}set: {{{key}: 1}}\n")


def test_a_search_may_not_vary_what_is_set(tmp_path: Path) -> None:
    study(
        tmp_path,
        "search: {over: {budget.parameters: {low: 0.7, high: 0.9}}, minimize: [parameters]}\n",
    )
    with pytest.raises(InputError, match=r"--set budget.parameters: 'budget.parameters' varies"):
        load_study(tmp_path / "s.yaml", ["budget.parameters=0.8"])


def test_an_axis_that_no_run_has_is_refused(tmp_path: Path) -> None:
    AutoConfig.for_model("llama", **SHAPE).save_pretrained(tmp_path / "m")
    text = (
        BASE.replace("model: m", f"model: {tmp_path / 'm'}")
        + "grid: {seed: [0, 1]}\nx: perplexity.nothing.here\n"
    )
    (tmp_path / "s.yaml").write_text(text)
    status, _, err = invoke(
        "ablate", tmp_path / "s.yaml", "--output", tmp_path / "out", "--dry-run"
    )
    assert (
        status == 2
        and "x: no run will have numbers called 'perplexity.nothing.here'" in " ".join(err.split())
    )


def seconds(tmp_path: Path, **changes: Any) -> float:
    AutoConfig.for_model("llama", **SHAPE).save_pretrained(tmp_path / "m")
    tree = {
        "model": str(tmp_path / "m"),
        "calibrate": {"data": "t.npy", "sequences": 64, "tokens": 512},
        "steps": [
            {"spaces": "mlp", "rotate": "permute", "select": changes.pop("select", "uniform")}
        ],
        "budget": {"parameters": 0.9},
    }
    return _own(Planner(Execution()).job([Variant({}, Recipe.from_dict(tree | changes))]))  # type: ignore[no-any-return]


def test_what_selectors_measure_and_recovery_are_forecast(tmp_path: Path) -> None:
    pytest.importorskip("cma")
    base, calibration = seconds(tmp_path), 64 * 512
    passes = {}
    for name, select in {
        "scan": {"sensitivity": {"points": 2}},
        "more": {"sensitivity": {"points": 4}},
        "search": {"cma_es": {"evaluations": 60}},
    }.items():
        passes[name] = seconds(tmp_path, select=select) - base
    one = (passes["more"] - passes["scan"]) / 10  # blocks × points more
    assert passes["scan"] == pytest.approx(11 * one) and passes["more"] == pytest.approx(21 * one)
    assert 30 * one < passes["search"] <= 62 * one
    recovered = seconds(tmp_path, recover={"tokens": calibration}) - base
    assert recovered == pytest.approx(3 * 8 * one)  # of which one in eight sequences is held out


def test_a_search_is_forecast_by_a_sample(tmp_path: Path) -> None:
    AutoConfig.for_model("llama", **SHAPE).save_pretrained(tmp_path / "m")
    text = BASE.replace("model: m", f"model: {tmp_path / 'm'}")
    text += "search: {over: {seed: {low: 0, high: 99}}, minimize: [parameters], trials: TRIALS}\n"
    found = []
    for trials in (1, 50):
        (tmp_path / "s.yaml").write_text(text.replace("TRIALS", str(trials)))
        command = ("ablate", tmp_path / "s.yaml", "--output", tmp_path / "out", "--dry-run")
        found.append(json.loads(invoke(*command, "--json")[1]))
        assert "expected" in invoke(*command)[1]
    one, fifty = found
    assert (one["runs"], fifty["runs"]) == (1, 50) and 0 < one["seconds"] < fifty["seconds"]
    assert fifty["disk"] == one["disk"] + 49 * REPORT_BYTES


def test_what_comes_later_may_refine_what_came_before(tmp_path: Path) -> None:
    text = "grid:\n  steps.0.select: {even: {uniform: {keep: 0.5}}}\n  steps.0.select.uniform.keep: [0.5, 0.75]\n"
    keeps = [v.recipe.steps[0].select.keep for v in study(tmp_path, text).variants()]  # type: ignore[attr-defined]
    assert keeps == [0.5, 0.75]


def test_a_base_that_is_not_there_is_told_with_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("model: m\nsteps: []\n")
    with pytest.raises(InputError, match=r"s.yaml:1: base: .*; did you mean 'base.yaml'\?"):
        study(tmp_path, "", "base: bas.yaml\n")


def test_a_recipe_that_no_run_can_have_is_refused_before_anything_runs(tmp_path: Path) -> None:
    AutoConfig.for_model("llama", **SHAPE).save_pretrained(tmp_path / "m")
    text = (
        BASE.replace("model: m", f"model: {tmp_path / 'm'}")
        + "grid: {steps.0.rotate: [permute, pca]}\n"
    )
    (tmp_path / "s.yaml").write_text(text)
    status, _, err = invoke("ablate", tmp_path / "s.yaml", "--output", tmp_path / "out")
    assert (
        status == 2
        and "makes bases of the group 'orthogonal'" in err
        and "steps.0.rotate = pca" in err
    )
    assert "Traceback" not in err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", STUDIES, ids=lambda f: f.stem)
def test_every_study_that_ships_is_planned_without_weights(file: Path, tmp_path: Path) -> None:
    kind, shape = ("gemma3_text", GEMMA) if file.stem.startswith("gemma") else ("llama", SHAPE)
    AutoConfig.for_model(kind, **shape).save_pretrained(tmp_path / "m")
    found = load_study(file, [f"model={tmp_path / 'm'}"])
    jobs = Planner(Execution()).jobs(found.variants())
    seen = outlook(jobs, {})
    assert 12 <= seen.runs == len(jobs) and seen.done == 0 and seen.seconds > 0
    texts = {len(v.recipe.evaluate[0].perplexity.each()) for v in found.variants()}
    assert seen.calibrations <= seen.runs and 0 < seen.evaluations <= max(2, *texts)
    assert (seen.calibrations == seen.runs) is (file.stem in ("calibration", "mixtures"))
    assert file.read_text().startswith("# ")  # what it asks


def test_a_run_is_keyed_by_its_recipe_and_the_files_that_it_names(tmp_path: Path) -> None:
    data = tmp_path / "t.npy"
    data.write_bytes(b"1")
    text = BASE.replace("t.npy", str(data))
    text = f"{text}grid: {{seed: [0, 1]}}\nx: seed\n"
    first = study(tmp_path, "", text).variants() + study(tmp_path, "", text).variants()
    keys = [key(v.recipe, Execution()) for v in first]
    assert keys[0] == keys[2] != keys[1]
    assert key(first[0].recipe, Execution(speed=True)) != keys[0]
    assert key(first[0].recipe, Execution("cuda")) != keys[0]  # where numbers have other types
    assert (
        key(first[0].recipe, Execution(processes=2, threads=1)) == keys[0]
    )  # how it is computed changes nothing
    data.write_bytes(b"22")
    assert key(first[0].recipe, Execution()) != keys[0]
    task = tmp_path / "task.yaml"
    task.write_text("task: sums\n")
    asked = first[0].recipe.to_dict() | {
        "evaluate": [{"tasks": {"names": ["arc_easy", str(task)]}}]
    }
    before = key(Recipe.from_dict(asked), Execution())
    task.write_text("task: other sums\n")
    assert key(Recipe.from_dict(asked), Execution()) != before


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12))
def test_the_front_is_what_no_run_beats(values: list[tuple[int, int]]) -> None:
    rows = [{"run": str(n), "parameters": x, "perplexity": y} for n, (x, y) in enumerate(values)]
    best = front(rows, ("parameters", "perplexity"))

    def beaten(n: int) -> bool:
        x, y = values[n]
        return any((a, b) != (x, y) and a <= x and b <= y for a, b in values)

    assert best == {str(n) for n in range(len(values)) if not beaten(n)}


def test_columns_of_several_kinds_become_words_and_none_stays_none() -> None:
    table = arrow([{"a": 1, "b": 1, "c": None}, {"a": "x", "b": 0.5}])
    assert table.to_pydict() == {"a": ["1", "x"], "b": [1.0, 0.5], "c": [None, None]}


def test_formulas_among_labels_are_text_in_a_spreadsheet(tmp_path: Path) -> None:
    labels = ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(1)", "\t=1", "-0.5", "pca", "a=b"]
    write(tmp_path, [{"=x": label, "n": -1.5} for label in labels])
    with (tmp_path / "results.csv").open(newline="") as file:
        head, *rows = csv.reader(file)
    assert head == ["'=x", "n"] and {row[1] for row in rows} == {"-1.5"}
    assert [row[0] for row in rows] == [f"'{x}" for x in labels[:5]] + labels[5:]
    assert parquet.read_table(tmp_path / "results.parquet")["=x"].to_pylist() == labels


def test_seeds_are_one_line_of_a_table_for_papers() -> None:
    row = {"status": "done", "parameters": 100, "perplexity_error": 0.5, "run": "a"}
    seeds = enumerate((9.0, 10.0, 11.0))
    found = [row | {"rotate": "pca", "seed": n, "perplexity": p, "run": str(n)} for n, p in seeds]
    found.append(row | {"rotate": "none", "seed": 0, "perplexity": 20.0, "run": "b"})
    found.append({"status": "failed", "rotate": "lost", "seed": 0, "run": "c"})
    grid = latex("s", {"rotate": "rotate", "seed": "seed"}, found)
    assert list(grid.columns) == ["rotate", "parameters", "perplexity"]
    assert grid.rows == [["pca", "100", "10.00 ± 0.58"], ["none", "100", "20.00 ± 0.50"]]


def test_no_label_is_cut_off_on_a_narrow_terminal() -> None:
    name = "mixed_energy_of_everything_that_there_is_under_the_sun"
    row = {"run": "a", "status": "done", "parameters": 10**9, "perplexity": 12.5, "seconds": 3.0}
    console = Console(width=60, file=io.StringIO())
    console.print(terminal("s", {"rotate": "rotate"}, [row | {"rotate": name}]))
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in said and "12.50" in said
    column = re.sub(r"[\W\d_]", "", "".join(line[2:34] for line in said.splitlines()))
    assert name.replace("_", "") in column


def test_the_costs_that_are_drawn_tell_runs_apart() -> None:
    rows = [{"parameters": 1, "flops": n, "kv_bytes": n, "seconds_per_token": None} for n in (2, 3)]
    assert cost_axes(rows) == ["flops", "kv_bytes"]
    assert cost_axes([]) == cost_axes(rows[:1]) == ["parameters"]


def test_labels_are_short() -> None:
    assert (
        short({"pca": {"of": "raw"}}) == "pca(of=raw)"
        and short(0.5) == 0.5
        and short([1, 2]) == "1 + 2"
    )


@pytest.mark.parametrize("file", STUDIES, ids=lambda f: f.stem)
def test_a_study_that_is_written_is_read_as_the_same_runs_anywhere(
    file: Path, tmp_path: Path
) -> None:
    (tmp_path / file.name).write_text(load_study(file, ["seed=3"]).to_yaml())
    whole = load_study(tmp_path / file.name)
    expected = [
        (dict(v.varied), v.recipe.to_dict()) for v in load_study(file, ["seed=3"]).variants()
    ]
    assert [(dict(v.varied), v.recipe.to_dict()) for v in whole.variants()] == expected
    assert (
        whole.options.x == load_study(file).options.x
        and whole.options.speed == load_study(file).options.speed
    )


def test_a_dry_run_is_one_json_document(tmp_path: Path) -> None:
    AutoConfig.for_model("llama", **SHAPE).save_pretrained(tmp_path / "m")
    text = BASE.replace("model: m", f"model: {tmp_path / 'm'}")
    (tmp_path / "s.yaml").write_text(text + "grid: {seed: [0, 1]}\n")
    status, out, _ = invoke(
        "ablate", tmp_path / "s.yaml", "--output", tmp_path / "out", "--dry-run", "--json"
    )
    found = json.loads(out)
    assert (
        status == 0
        and found["runs"] == 2
        and [r["status"] for r in found["rows"]] == ["not run"] * 2
    )
    assert not (tmp_path / "out").exists()
