"""What `plan` and `inspect` answer again without computing it, and when they do not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from folders import invoke, save_model

from invariance.cli import answers
from invariance.cli.answers import Question, answer, stamp

RECIPE = "model: MODEL\nsteps: [{spaces: mlp, rotate: identity, select: {uniform: {keep: 0.5}}, slice: truncate}]\n"


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("INVARIANCE_CACHE", str(tmp_path / "cache"))
    save_model(tmp_path / "model")
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("MODEL", str(tmp_path / "model")))
    return path


class Finder:
    """Finds an answer, and counts how often it was asked."""

    def __init__(self, model: Path) -> None:
        self.model, self.asked = model, 0

    def __call__(self) -> dict[str, Any]:
        self.asked += 1
        return {"model": str(self.model), "found": self.asked}


def test_an_answer_is_found_once_and_again_when_anything_that_it_hangs_on_has_changed(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = recipe.parent / "model"
    find, asked = Finder(model), Question("plan", recipe, ["seed=0"])

    def found() -> int:
        return int(answer(asked, find)["found"])

    assert found() == found() == 1
    assert answer(Question("plan", recipe, ["seed=1"]), find)["found"] == 2
    assert answer(Question("inspect", recipe, ["seed=0"]), find)["found"] == 3
    recipe.write_text(recipe.read_text() + "# another\n")
    assert found() == found() == 4
    os.utime(model / "config.json", ns=(1, 1))
    assert found() == found() == 5
    for kept in (recipe.parent / "cache" / "answers").iterdir():
        kept.write_text(kept.read_text().replace('"found": 5', '"found": 6'))
    assert found() == 6 == find.asked  # found, not read: the checksum tells
    monkeypatch.setattr(answers, "_program", lambda: ["another version"])
    assert found() == 7


def test_a_model_on_the_hub_is_asked_anew() -> None:
    find = Finder(Path("owner/name"))
    assert stamp("owner/name") is None
    assert [answer(Question("inspect", None, ["owner/name"]), find)["found"] for _ in "ab"] == [
        1,
        2,
    ]


def test_the_second_plan_imports_no_torch_and_says_the_same(recipe: Path) -> None:
    status, first, error = invoke("plan", recipe, "--json")
    assert status == 0, error
    command = [
        sys.executable,
        "-X",
        "importtime",
        "-m",
        "invariance",
        "plan",
        str(recipe),
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == json.loads(first)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "invariance.cli.answers" in imported and not {"torch", "transformers"} & imported
