"""Files from disk that cannot be: each is refused in one line that names the file and the key, at once."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from folders import invoke, save_model, save_tokens
from numpy.lib import format as npy

RECIPE = """\
model: model
calibrate: {data: tokens.npy, dtype: float32}
steps:
  - {spaces: mlp, select: {uniform: {width: 48}}}
evaluate: [{perplexity: {data: tokens.npy}}]
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("faulty")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INVARIANCE_CACHE", str(root / "cache"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.chdir(root)
        save_model(root / "model")
        save_model(root / "opt", "opt")
        save_tokens(root / "tokens.npy")
        (root / "r.yaml").write_text(RECIPE)
        step = "residual, segments: block, rotate: pca"
        (root / "sliced.yaml").write_text(RECIPE.replace("mlp", step).replace("48", "24"))
        status, _, err = invoke("run", "sliced.yaml", "--output", "made")
        assert status == 0, err
        yield root


def refused(says: str, *arguments: object) -> None:
    status, out, err = invoke(*arguments)
    told = " ".join(err.split())
    assert (status, out) == (2, ""), (status, told)
    assert says in told and "unexpected" not in told, told


Change = Callable[[dict[str, Any]], object]
CONFIGS: dict[str, tuple[str, Change, str]] = {
    "heads that groups do not divide": (
        "model",
        lambda c: c.update(num_key_value_heads=3),
        "num_key_value_heads: 4 query heads",
    ),
    "no width": ("model", lambda c: c.pop("hidden_size"), "the key 'hidden_size' is missing"),
    "no MLP width": ("opt", lambda c: c.pop("ffn_dim"), "the key 'ffn_dim' is missing"),
    "too deep": (
        "model",
        lambda c: c.update(num_hidden_layers=100_000),
        "num_hidden_layers: got 100000",
    ),
    "dropout": ("opt", lambda c: c.update(dropout=2), "dropout: got 2"),
    "NaN": ("model", lambda c: c.update(rms_norm_eps=float("nan")), "rms_norm_eps: nan"),
    "infinite": ("model", lambda c: c.update(rms_norm_eps=float("inf")), "rms_norm_eps: inf"),
    "negative eps": ("model", lambda c: c.update(rms_norm_eps=-1e-6), "rms_norm_eps: got"),
    "a word": ("model", lambda c: c.update(hidden_size="32"), "hidden_size: got 32"),
    "negative": ("model", lambda c: c.update(vocab_size=-1), "vocab_size: got -1"),
    "huge": ("model", lambda c: c.update(intermediate_size=10**30), "intermediate_size: got 1000"),
    "infinite, deep": (
        "model",
        lambda c: c.update(rope_parameters={"rope_theta": float("inf")}),
        "rope_parameters.rope_theta: inf",
    ),
    "rotary base of zero": (
        "model",
        lambda c: c.update(rope_parameters={"rope_type": "default", "rope_theta": 0}),
        "rope_parameters.rope_theta: got 0",
    ),
    "rotary base of older configs": (
        "model",
        lambda c: c.update(rope_theta=-1.0),
        "rope_theta: got -1",
    ),
    "rotary factor": (
        "model",
        lambda c: c.update(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": -1}),
        "rope_parameters.factor: got -1",
    ),
    "a list of rotary factors": (
        "model",
        lambda c: c.update(rope_scaling={"rope_type": "longrope", "short_factor": [1.0, 0.0]}),
        "rope_scaling.short_factor.1: got 0",
    ),
    "a token that cannot be": ("model", lambda c: c.update(eos_token_id=10**20), "eos_token_id"),
    "no type": ("model", lambda c: c.pop("model_type"), "no model_type"),
}


@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.parametrize("command", ["inspect", "plan"])
def test_a_config_that_cannot_be_is_refused_with_its_key(
    root: Path, case: str, command: str
) -> None:
    model, change, says = CONFIGS[case]
    bad = root / "bad"
    shutil.rmtree(bad, ignore_errors=True)
    shutil.copytree(root / model, bad)
    config = json.loads((bad / "config.json").read_text())
    change(config)
    (bad / "config.json").write_text(json.dumps(config))
    asked = ("r.yaml", "--set", "model=bad") if command == "plan" else ("bad",)
    refused(says, command, *asked)


CUTS: dict[str, tuple[Change, str]] = {
    "a width below zero": (lambda c: c["widths"].update({"x.0.0": -3}), "widths.x.0.0: got -3"),
    "a width that is no number": (
        lambda c: c["widths"].update({"x.0.0": "a"}),
        "widths.x.0.0: got a",
    ),
    "a width beyond all": (
        lambda c: c["widths"].update({"x.0.0": 10**12}),
        "is more than the 32",
    ),
    "a width beyond the space": (
        lambda c: c["widths"].update({"x.0.0": 33}),
        "33 is more than the 32",
    ),
    "a space that is not there": (lambda c: c["widths"].update({"mlp.9": 3}), "mlp.9"),
    "pairs that are not there": (lambda c: c.update(pairs={"qk.0": 99}), "lies"),
    "ranks that are not there": (lambda c: c.update(ranks={"x.9.9": 2}), "lies"),
    "pairs below zero": (lambda c: c.update(pairs={"qk.0": -1}), "pairs.qk.0: got -1"),
    "ranks below zero": (lambda c: c.update(ranks={"x.0.1": -1}), "ranks.x.0.1: got -1"),
}


def sliced(root: Path) -> Path | None:
    """A checkpoint of the kind that lists widths, if there is one."""
    config = json.loads((root / "made" / "model" / "config.json").read_text())
    return root / "made" / "model" if config["model_type"] == "invariance" else None


@pytest.mark.parametrize("case", CUTS)
def test_a_sliced_config_that_lies_is_refused(root: Path, case: str) -> None:
    if (made := sliced(root)) is None:
        pytest.skip("sliced checkpoints are of another form")
    change, says = CUTS[case]
    bad = root / "lies"
    shutil.rmtree(bad, ignore_errors=True)
    shutil.copytree(made, bad)
    config = json.loads((bad / "config.json").read_text())
    change(config["invariance"])
    (bad / "config.json").write_text(json.dumps(config))
    refused(says, "evaluate", "lies", "--data", "tokens.npy")


def test_a_config_nested_beyond_all_is_refused(root: Path) -> None:
    (root / "deep").mkdir()
    (root / "deep" / "config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    refused("nested too deeply", "inspect", "deep")
    shallow = '{"model_type": "llama", "a":' + "[" * 500 + "]" * 500 + "}"
    (root / "deep" / "config.json").write_text(shallow)
    refused("nested too deeply", "inspect", "deep")


def test_an_index_that_names_files_elsewhere_is_refused(root: Path) -> None:
    shutil.copytree(root / "model", root / "index")
    (root / "index" / "model.safetensors").rename(root / "b.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "../b.safetensors"}}
    (root / "index" / "model.safetensors.index.json").write_text(json.dumps(index))
    refused("../b.safetensors", "evaluate", "index", "--data", "tokens.npy")


def test_a_tokenizer_that_cannot_write_unknown_words_is_refused(root: Path) -> None:
    shutil.copytree(root / "model", root / "words")
    path = root / "words" / "tokenizer.json"
    path.write_text(path.read_text().replace('"unk_token": "<unk>"', '"unk_token": "<gone>"'))
    (root / "text.txt").write_text("something unknown " * 900)
    refused("tokenizer cannot be read", "evaluate", "words", "--data", "text.txt")


def header(shape: tuple[int, ...], descr: str = "<i8", data: bytes = b"\0" * 64) -> bytes:
    import io

    made = io.BytesIO()
    npy.write_array_header_1_0(made, {"descr": descr, "fortran_order": False, "shape": shape})
    return made.getvalue() + data


ARRAYS: dict[str, tuple[bytes, str]] = {
    "a negative shape": (header((-1, 4)), "shape.0 is -1"),
    "two negative ones": (header((-2, -4)), "shape.0 is -2"),
    "more than the file has": (header((2**40, 2**20)), "bytes, and the file has"),
    "objects": (header((1, 1), "|O"), "Python objects"),
    "no header": (b"\x93NUMPY\x01\x00\xff", "numpy.load fails"),
    "an archive": (b"PK\x03\x04" + b"\0" * 100, "numpy.load fails"),
    "nothing": (b"", "numpy.load fails"),
    "a header of brackets": (b"\x93NUMPY\x01\x00\xff\x00" + b"(" * 255, "numpy.load fails"),
    "empty": (header((0, 4)), "holds int64 of shape (0, 4)"),
    "floats": (header((2, 4), "<f8"), "holds float64"),
}


@pytest.mark.parametrize("case", ARRAYS)
def test_an_array_that_cannot_be_is_refused(root: Path, case: str) -> None:
    raw, says = ARRAYS[case]
    (root / "bad.npy").write_bytes(raw)
    refused(says, "evaluate", "model", "--data", "bad.npy")


RECIPES: dict[str, tuple[tuple[str, ...], str]] = {
    "nobody's home": (("model=~nouser/x",), "there is no user of that name"),
    "nobody's data": (("calibrate.data=~nouser/x.npy",), "there is no user of that name"),
    "a huge batch": (("calibrate.batch=100000000000000000000",), "calibrate.batch"),
    "a huge seed": (("seed=100000000000000000000",), "seed"),
    "a huge rank": (("recover={lora: {rank: 1000000000000000000000000000000}}",), "lora.rank"),
    "a huge rate": (("recover={learning_rate: 1.0e+300}",), "learning_rate"),
    "machines": (("recover={trainer: {num_nodes: 2}}",), "num_nodes"),
    "a long name": (("model=" + "x" * 300,), "File name too long"),
    "a long path of data": (("calibrate.data=" + "x/" * 3000 + "y.npy",), "File name too long"),
}


@pytest.mark.parametrize("case", RECIPES)
def test_a_recipe_that_cannot_be_is_refused(root: Path, case: str) -> None:
    sets, says = RECIPES[case]
    refused(says, "run", "r.yaml", *(part for s in sets for part in ("--set", s)))


def test_a_pipe_is_no_recipe(root: Path) -> None:
    os.mkfifo(root / "pipe.yaml")
    for command in ("run", "plan", "ablate"):
        refused("no regular file", command, "pipe.yaml")
    for command in ("inspect", "verify"):
        refused("no regular file", command, "pipe.yaml")


def test_an_extract_of_a_negative_share_is_refused(root: Path) -> None:
    refused("made", "extract", "made", "--width", "-3", "--output", "member")


STUDY = "base: r.yaml\nsearch:\n  trials: 1\n  over: {seed: OVER}\n"
RANGES: dict[str, str] = {
    "{low: 0, hihg: 9}": "hihg",
    "{low: 0, high: 9, log: banana}": "log",
    "{low: 0, high: 9, step: 0}": "step",
    "{low: 0, high: 1.0e+300}": "high",
    "{low: 9, high: 0}": "no numbers lie there",
    "{low: a, high: 9}": "low",
}


@pytest.mark.parametrize("over", RANGES)
def test_a_range_that_cannot_be_is_refused(root: Path, over: str) -> None:
    (root / "study.yaml").write_text(STUDY.replace("OVER", over))
    refused(RANGES[over], "ablate", "study.yaml", "--dry-run")


def test_a_step_of_null_is_any_step(root: Path) -> None:
    (root / "study.yaml").write_text(STUDY.replace("OVER", "{low: 0, high: 9, step: null}"))
    status, _, err = invoke("ablate", "study.yaml", "--dry-run")
    assert status == 0, err


def test_a_study_that_calibrates_nothing_runs_and_its_damaged_runs_are_done_again(
    root: Path,
) -> None:
    (root / "plain.yaml").write_text(
        "base:\n  model: model\n  steps: [{spaces: mlp, select: {uniform: {width: 48}}}]\n"
        "  evaluate: [{perplexity: {data: tokens.npy}}]\n"
        "grid: {steps.0.select.uniform.width: [32, 48]}\n"
    )
    status, _, err = invoke("ablate", "plain.yaml", "--output", "study")
    assert status == 0, err
    first, second = sorted((root / "study" / "runs").glob("*/report.json"))
    report = json.loads(first.read_text())
    whole = second.stat().st_mtime_ns
    for damage in ("{", "[" * 10**5, "{}", first.read_text().replace('"widths"', '"wdths"')):
        first.write_text(damage)
        status, _, err = invoke("ablate", "plain.yaml", "--output", "study")
        assert status == 0, err
        again = json.loads(first.read_text())
        assert again["perplexity"] == report["perplexity"]
    assert second.stat().st_mtime_ns == whole
