"""The command line: help that teaches, one JSON document, exit statuses, and folders left alone."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import invoke, save_model, save_tokens
from ruamel.yaml import YAML

from invariance.calibrate import certificate
from invariance.compress import exactness
from invariance.method.interfaces import registry
from invariance.model.verify import Certificate

COMMANDS = (
    "run",
    "plan",
    "ablate",
    "compare",
    "verify",
    "inspect",
    "evaluate",
    "bench",
    "extract",
    "methods",
    "schema",
)
RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
RECIPE = """\
model: ROOT/model
calibrate: {data: ROOT/tokens.npy, dtype: float32}
steps:
  - {spaces: residual, rotate: pca, select: {uniform: {width: 24}}}
"""
FAILED = Certificate(relative_error=1.0, tolerance=1e-12, negative_control=1.0, spaces=1)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("cli")
    save_model(root / "model")
    save_tokens(root / "tokens.npy")
    (root / "recipe.yaml").write_text(RECIPE.replace("ROOT", str(root)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INVARIANCE_CACHE", str(root / "cache"))
        patch.chdir(root)
        yield root


@pytest.fixture(scope="module")
def made(root: Path) -> Path:
    """A folder that a run has written."""
    status, _, err = invoke("run", root / "recipe.yaml", "--output", root / "made", "--json")
    assert status == 0, err
    return root / "made"


def document(*arguments: object) -> Any:
    """The one JSON document that a command writes."""
    status, out, err = invoke(*arguments, "--json")
    assert status == 0, err
    return json.loads(out)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_says_what_it_does_and_takes(command: str) -> None:
    status, out, _ = invoke(command, "--help")
    assert status == 0
    assert f"invariance {command}" in out
    assert len(out.split()) > 20
    if command not in ("schema",):
        assert "--json" in out and "JSON" in out


def test_help_of_the_program_says_where_to_begin() -> None:
    for arguments in (("--help",), ()):
        status, out, err = invoke(*arguments)
        assert status in (0, 2) and (out + err).count("invariance") >= 3
        assert all(command in out + err for command in COMMANDS)
        assert "recipes" in out + err


def test_help_shows_what_an_override_looks_like() -> None:
    assert "steps.0.select.uniform.width=432" in " ".join(
        invoke("run", "--help")[1].replace("│", " ").split()
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ("plan", "recipe.yaml"),
        ("verify", "model"),
        ("inspect", "model"),
        ("evaluate", "model", "--data", "tokens.npy"),
        ("methods",),
        ("methods", "pca"),
        ("run", "recipe.yaml", "--output", "again"),
    ],
    ids=" ".join,
)
def test_json_is_one_document_and_the_readable_form_is_none(
    root: Path, arguments: tuple[str, ...]
) -> None:
    assert document(*arguments)
    flags = ("--overwrite",) if arguments[0] == "run" else ()
    status, out, _ = invoke(*arguments, *flags)
    assert status == 0 and out.strip()
    with pytest.raises(ValueError):
        json.loads(out)


def test_plan_says_what_a_run_then_does(root: Path, made: Path) -> None:
    chart = document("plan", "recipe.yaml")
    report = json.loads((made / "report.json").read_text())
    widths = {name: u["width"] for u in chart["units"] for name in u["spaces"]}
    assert widths and all(report["widths"][name] == k for name, k in widths.items())
    assert chart["flops_per_token"] == report["flops_per_token"]
    assert chart["parameters"] == report["parameters"]


def test_plan_reads_no_weights(root: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((root / "model" / "config.json").read_text())
    assert document("plan", "recipe.yaml", "--set", f"model={tmp_path}")["units"]
    assert invoke("verify", tmp_path)[0] == 2


def test_verify_certifies_the_model_and_what_a_run_made_of_it(root: Path, made: Path) -> None:
    for folder in ("model", made / "model"):
        found = document("verify", folder)
        assert found["passed"] and 0 < found["relative_error"] <= found["tolerance"] < 1e-10
        assert found["negative_control"] > 1e-3
    assert document("verify", "model", "--seed", 1) != document("verify", "model", "--seed", 2)
    assert document("verify", "model", "--seed", 1) == document("verify", "model", "--seed", 1)


def test_verify_takes_a_checkpoint_of_our_own(root: Path) -> None:
    flags = ("--set", "steps.0.segments=stage", "--output", "staged", "--overwrite")
    assert not document("run", "recipe.yaml", *flags)["model"]["stock"]
    assert document("verify", "staged/model")["passed"]
    found = document("inspect", "staged/model")
    assert len(found["shortcuts"]) == 4 and found["spaces"]["x.1.0"]["dim"] == 24
    report = json.loads(Path("staged/report.json").read_text())
    assert found["parameters"] == report["parameters"]["sliced"]
    found = document("evaluate", "staged/model", "--data", "tokens.npy")
    assert found["perplexity"]["tokens.npy"]["model"] > 1


def test_inspect_lists_spaces_and_costs(root: Path) -> None:
    found = document("inspect", "model")
    assert found["spaces"]["vo.0"] == {"kind": "vo", "dim": 8, "copies": 2, "group": "invertible"}
    assert found["family"] == "llama" and found["tied"] and found["shortcuts"] == []
    assert (
        found["kv_bytes_per_token"] == 4 * 2 * 2 * 2 * 8
    )  # bytes, layers, keys and values, heads, dims


def test_evaluate_measures_perplexity_of_all_windows_or_some(root: Path) -> None:
    found = document("evaluate", "model", "--data", "tokens.npy")["perplexity"]["tokens.npy"]
    assert math.isfinite(found["model"]) and found["model"] > 1
    assert (found["tokens"], found["window"]) == (16 * 15, 16)
    flags = ("--data", "tokens.npy", "--sequences", 4, "--tokens", 8)
    fewer = document("evaluate", "model", *flags)["perplexity"]["tokens.npy"]
    assert (fewer["tokens"], fewer["window"]) == (4 * 7, 8)
    assert fewer["model"] != found["model"]


def test_more_tokens_than_positions_are_refused(root: Path) -> None:
    save_model(root / "opt", "opt")
    save_tokens(root / "long.npy", 2, 321)
    for arguments in (
        ("evaluate", "opt", "--data", "long.npy"),
        ("verify", "opt", "--tokens", 321),
    ):
        status, out, err = invoke(*arguments)
        assert (
            status == 2
            and out == ""
            and "the model has 320 positions. Ask for 320 tokens or fewer" in err
        )
    assert document("verify", "opt", "--tokens", 320)["passed"]


def test_a_budget_that_cannot_be_met_is_refused_by_the_plan(root: Path) -> None:
    text = RECIPE.replace("ROOT", str(root)).replace("{uniform: {width: 24}}", "global_energy")
    (root / "poor.yaml").write_text("budget: {parameters: 0.01}\n" + text)
    status, out, err = invoke("plan", root / "poor.yaml")
    assert status == 2 and out == "" and "poor.yaml:5" in err and "cannot be met" in err


def test_overrides_reach_any_key(root: Path) -> None:
    flags = (
        "--set",
        "steps.0.select.uniform.keep=0.5",
        "--set",
        "steps.1={spaces: mlp, rotate: permute}",
    )
    units = document("plan", "recipe.yaml", *flags)["units"]
    assert units[0]["width"] == 16 and units[-1]["rotate"] == "permute"


def test_methods_lists_all_that_are_registered_and_shows_one(root: Path) -> None:
    listed = {(m["kind"], m["name"]) for m in document("methods")}
    assert listed == {
        (kind, name)
        for kind in ("rotate", "joint", "select", "slice", "round")
        for name in registry(kind)
    }
    status, out, _ = invoke("methods", "pca")
    assert status == 0 and "arXiv:2401.15024" in out and "normed" in out
    status, _, err = invoke("methods", "pcaa")
    assert status == 2 and "did you mean 'pca'?" in err


def test_schema_describes_the_recipes_that_ship() -> None:
    status, out, _ = invoke("schema")
    schema = json.loads(out)
    assert status == 0 and set(schema["required"]) == {"model", "steps"}
    keys = set(schema["properties"])
    for path in RECIPES:
        assert set(YAML(typ="safe", pure=True).load(path)) <= keys, path


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_the_schema_admits_the_recipes_that_ship(path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads(invoke("schema")[1])
    recipe = YAML(typ="safe", pure=True).load(path)
    jsonschema.validate(recipe, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(recipe | {"stepz": []}, schema)


@pytest.mark.parametrize(
    "arguments",
    [
        ("nonsense",),
        ("run",),
        ("inspect",),
        ("run", "r.yaml", "--nonsense"),
        ("verify", "m", "--tokens", "0"),
    ],
)
def test_a_command_line_that_cannot_be_exits_with_2(root: Path, arguments: tuple[str, ...]) -> None:
    status, out, err = invoke(*arguments)
    assert status == 2 and out == "" and "Traceback" not in err and "Usage" in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
@pytest.mark.parametrize("command", ["run", "verify", "evaluate"])
def test_cuda_is_refused_where_there_is_none(root: Path, command: str) -> None:
    target = {"run": "recipe.yaml"}.get(command, "model")
    data = ("--data", "tokens.npy") if command == "evaluate" else ()
    output = ("--output", "cuda") if command == "run" else ()
    status, out, err = invoke(command, target, *data, *output, "--device", "cuda")
    assert (
        status == 2
        and out == ""
        and err.startswith("error: --device cuda: this machine has no CUDA")
    )
    assert not Path("cuda").exists()


def test_auto_is_a_device(root: Path) -> None:
    assert document("verify", "model", "--device", "auto")["passed"]


def test_a_run_leaves_a_full_folder_alone_unless_told_to_replace_it(root: Path, made: Path) -> None:
    before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in made.rglob("*") if p.is_file()}
    status, _, err = invoke("run", "recipe.yaml", "--output", made)
    assert status == 2 and "--overwrite" in err
    assert before == {
        p: (p.stat().st_mtime_ns, p.stat().st_size) for p in made.rglob("*") if p.is_file()
    }
    narrow = ("--set", "steps.0.select.uniform.width=16", "--output", "replaced", "--overwrite")
    assert invoke("run", "recipe.yaml", "--output", "replaced")[0] == 0
    assert document("run", "recipe.yaml", *narrow)["widths"]["x.0.0"] == 16
    assert json.loads(Path("replaced/report.json").read_text())["widths"]["x.0.0"] == 16
    assert not [p for p in root.iterdir() if p.name.startswith(".")]  # nothing temporary stays


def test_the_recipe_that_a_run_writes_runs_again_to_the_same_model(root: Path, made: Path) -> None:
    again = document("run", made / "recipe.yaml", "--output", "rerun")
    first = (made / "model" / "model.safetensors").read_bytes()
    assert Path("rerun/model/model.safetensors").read_bytes() == first
    assert again["widths"] == json.loads((made / "report.json").read_text())["widths"]


def test_a_failed_certificate_exits_with_1_and_writes_nothing(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exactness, "certify", lambda *a, **k: FAILED)
    status, out, err = invoke("run", "recipe.yaml", "--output", "failed", "--json")
    assert status == 1 and out == "" and "Traceback" not in err and "Nothing is written" in err
    assert not Path("failed").exists()


def test_a_failed_verification_says_so_and_exits_with_1(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certificate, "certify_random", lambda *a, **k: FAILED)
    status, out, err = invoke("verify", "model", "--json")
    assert status == 1 and not json.loads(out)["passed"] and "logits differ by" in err


def test_families_says_what_is_derived_and_refuses_what_no_type_is_called() -> None:
    status, out, err = invoke("families", "llama", "--jobs", "1", "--json")
    (row,) = json.loads(out)
    assert status == 0 and row["certified"] and row["error"] < 1e-10 < row["control"], err
    assert "residual O(32)" in row["spaces"]
    status, _, err = invoke("families", "llamma")
    assert status == 2 and "llamma" in err and "Traceback" not in err
