"""Anything may be in a recipe, a config, a file or on the command line: nothing but our own error comes out.

`INVARIANCE_FUZZ=1000` draws that many of each, by hand.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from folders import invoke, save_model, save_tokens
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from invariance.cli import commands
from invariance.core.errors import InvarianceError
from invariance.recipe.recipe import load_recover, parse_recipe
from invariance.study.study import load_study

DRAWN = int(os.environ.get("INVARIANCE_FUZZ", "15"))
fuzz = settings(
    max_examples=DRAWN,
    deadline=None,
    derandomize="INVARIANCE_FUZZ" not in os.environ,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)
RECIPE: dict[str, Any] = {
    "model": "model",
    "calibrate": {"data": "tokens.npy", "dtype": "float32", "batch": 8, "skip": 0},
    "budget": {"parameters": 0.9},
    "seed": 1,
    "steps": [
        {
            "spaces": "residual",
            "segments": "block",
            "rotate": "pca",
            "select": {"uniform": {"width": 24}},
        },
        {"spaces": "mlp", "select": "global_energy", "widths": {"multiple_of": 4}},
    ],
    "recover": {"lora": {"rank": 2}, "learning_rate": 1e-4, "trainer": {"precision": "32-true"}},
    "quantize": {"bits": 4, "group": 8},
    "evaluate": [{"perplexity": {"data": "tokens.npy", "batch": 4}}, {"samples": {"tokens": 4}}],
}
ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "model", "r": 8}
STUDY = {
    "base": RECIPE,
    "search": {"trials": 2, "over": {"seed": {"low": 0, "high": 9, "step": 1}}},
}
odd = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, -1, 2**31, 2**63, 10**20, 10**30, -(10**30)]),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["", "~nouser/x", "/dev/null", "..", "x" * 300, "packaged:", "nan", "*", "\0"]),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("fuzz")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INVARIANCE_CACHE", str(root / "cache"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.chdir(root)
        save_model(root / "model")
        save_tokens(root / "tokens.npy")
        (root / "text.jsonl").write_text('{"text": "The people of the United States"}\n' * 50)
        (root / "r.yaml").write_text(json.dumps(RECIPE))
        (root / "adapter").mkdir()
        (root / "adapter" / "adapter_config.json").write_text(json.dumps(ADAPTER))
        yield root


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all that is in plain data."""
    inside = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    return [path, *(p for key, child in inside for p in places(child, (*path, key)))]


@st.composite
def changed(draw: st.DrawFn, value: Any) -> Any:
    """Plain data with something odd in it, or something missing, or a key more."""
    found = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from([p for p in places(found) if p]))
        node = found
        for key in path[:-1]:
            node = node[key]
        how = draw(st.sampled_from(["replace", "remove", "add"]))
        if how == "replace" or isinstance(node, list):
            node[path[-1]] = draw(odd)
        elif how == "remove":
            del node[path[-1]]
        else:
            node[draw(st.text(max_size=6))] = draw(odd)
    return found


def clean(*arguments: object) -> None:
    """A command ends in one of our three ways, and never by a fault of ours."""
    status, _, err = invoke(*arguments)
    assert status in (0, 1, 2), (status, arguments, err)
    assert "a fault of the program" not in err and "Traceback" not in err, (arguments, err)


@given(found=changed(RECIPE))
@fuzz
def test_recipes(root: Path, found: Any) -> None:
    (root / "odd.yaml").write_text(json.dumps(found))
    clean("plan", "odd.yaml")


@given(found=changed(STUDY))
@fuzz
def test_studies(root: Path, found: Any) -> None:
    (root / "study.yaml").write_text(json.dumps(found))
    with suppress(InvarianceError):
        load_study(root / "study.yaml")


@given(text=st.text() | st.binary().map(lambda b: b.decode("latin-1")))
@fuzz
def test_texts_of_recipes(text: str) -> None:
    for read in (parse_recipe, lambda t: load_recover(None, [t])):
        with suppress(InvarianceError):
            read(text)  # type: ignore[operator]


@given(data=st.data())
@fuzz
def test_configs(root: Path, data: st.DataObject) -> None:
    bad = root / "bad"
    shutil.rmtree(bad, ignore_errors=True)
    shutil.copytree(root / "model", bad)
    config = json.loads((bad / "config.json").read_text())
    (bad / "config.json").write_text(json.dumps(data.draw(changed(config))))
    clean("inspect", "bad")


FILES = {
    "model/config.json": ("inspect", "model"),
    "model/model.safetensors": ("evaluate", "model", "--data", "tokens.npy"),
    "model/tokenizer.json": (
        "evaluate",
        "model",
        "--data",
        "text.jsonl",
        "--sequences",
        "2",
        "--tokens",
        "8",
    ),
    "model/tokenizer_config.json": (
        "evaluate",
        "model",
        "--data",
        "text.jsonl",
        "--sequences",
        "2",
        "--tokens",
        "8",
    ),
    "tokens.npy": ("evaluate", "model", "--data", "tokens.npy"),
    "text.jsonl": (
        "evaluate",
        "model",
        "--data",
        "text.jsonl",
        "--sequences",
        "2",
        "--tokens",
        "8",
    ),
    "r.yaml": ("plan", "r.yaml"),
    "adapter/adapter_config.json": ("inspect", "adapter"),
}


@pytest.mark.parametrize("name", FILES)
@given(data=st.data())
@settings(fuzz, max_examples=max(DRAWN // 3, 3))
def test_bytes_of_files(root: Path, name: str, data: st.DataObject) -> None:
    whole = (root / name).read_bytes()
    raw = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, min(len(raw), 400)))
        length = data.draw(st.integers(0, 8))
        raw[at : at + length] = data.draw(st.binary(max_size=8))
    if data.draw(st.booleans()):
        raw = raw[: data.draw(st.integers(0, len(raw)))]
    try:
        (root / name).write_bytes(raw)
        clean(*FILES[name])
    finally:
        (root / name).write_bytes(whole)


WORDS = [c.callback.__name__ for c in commands.app.registered_commands if c.callback] + [
    *("--json", "--set", "--output", "--data", "--plugin", "--device", "--overwrite", "--width"),
    *(
        "model",
        "tokens.npy",
        "r.yaml",
        "gone",
        "",
        "-1",
        "seed=x",
        "steps.9=1",
        "=",
        "\udcff",
        "x" * 300,
    ),
]


@given(arguments=st.lists(st.sampled_from(WORDS), max_size=5))
@fuzz
def test_command_lines(root: Path, arguments: list[str]) -> None:
    if set(arguments[:1]) & {"run", "recover", "ablate", "bench", "extract", "families"}:
        arguments = [*arguments, "--no-such-flag"]  # what they would do takes too long here
    clean(*arguments)
