"""A method written outside the package, in ten lines, named in a recipe as those that ship are."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from folders import invoke, save_model, save_tokens

from invariance.method import interfaces
from invariance.method.interfaces import ENTRY_POINTS

PLUGIN = '''\
from __future__ import annotations
from dataclasses import dataclass
import torch
from invariance import Basis, Group, Rotator, Space

@dataclass(frozen=True)
class Backwards(Rotator, name="backwards"):
    """The channels from the last to the first, a baseline of no merit."""
    first: int = 0  # how many stay in front
    produces = Group.PERMUTATION
    def fit(self, space: Space, moments) -> Basis:
        n = self.first
        eye = torch.eye(space.dim, dtype=torch.float64).repeat(space.copies, 1, 1)
        A = torch.cat([eye[..., :n], eye[..., n:].flip(-1)], -1)
        return Basis(A, torch.ones(space.copies, space.dim, dtype=torch.float64))
'''
RECIPE = """\
model: ROOT/model
steps:
  - {spaces: mlp, rotate: {backwards: {first: 3}}, select: {uniform: {width: 40}}}
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("plugin")
    save_model(root / "model")
    save_tokens(root / "tokens.npy")
    (root / "my_methods.py").write_text(PLUGIN)
    (root / "recipe.yaml").write_text(RECIPE.replace("ROOT", str(root)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INVARIANCE_CACHE", str(root / "cache"))
        patch.chdir(root)
        yield root


def report(*arguments: object) -> dict[str, object]:
    status, out, err = invoke("run", "recipe.yaml", *arguments, "--overwrite", "--json")
    assert status == 0, err
    return json.loads(out)


def test_a_method_that_nobody_registered_is_unknown(root: Path) -> None:
    status, _, err = invoke("plan", "recipe.yaml")
    assert (
        status == 2 and "no rotate method is called 'backwards'" in err and "recipe.yaml:3" in err
    )


def test_a_plugin_file_is_used_by_name(root: Path) -> None:
    found = report("--plugin", "my_methods.py", "--output", "by-file")
    assert found["widths"]["mlp.1"] == 40 and found["exactness"]["passed"]  # type: ignore[index]
    assert (root / "by-file" / "model" / "model.safetensors").is_file()


def test_a_plugin_module_is_used_by_name(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(root))
    monkeypatch.delitem(sys.modules, "my_methods", raising=False)
    assert report("--plugin", "my_methods", "--output", "by-module")["widths"]["mlp.0"] == 40  # type: ignore[index]


def test_a_plugin_is_found_by_its_entry_point(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(root))
    monkeypatch.delitem(sys.modules, "my_methods", raising=False)
    entry = importlib.metadata.EntryPoint("mine", "my_methods", ENTRY_POINTS)
    real = importlib.metadata.entry_points

    def entry_points(**params: str) -> importlib.metadata.EntryPoints:
        found = real(**params)
        return (
            importlib.metadata.EntryPoints([*found, entry])
            if params.get("group") == ENTRY_POINTS
            else found
        )

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    monkeypatch.setattr(interfaces, "_loaded", False)
    assert report("--output", "by-entry")["exactness"]["passed"]  # type: ignore[index]


def test_a_plugin_has_a_manual_page_and_a_schema_like_any_other(root: Path) -> None:
    status, out, _ = invoke("methods", "backwards", "--plugin", "my_methods.py", "--json")
    page = json.loads(out)
    assert status == 0 and page["doc"].startswith("The channels from the last")
    assert [(o["name"], o["default"]) for o in page["options"]] == [("first", 0)]
    assert "backwards" in invoke("schema")[1]


def test_options_of_a_plugin_are_checked_as_those_of_any_other(root: Path) -> None:
    for value, told in (("{fist: 3}", "did you mean 'first'?"), ("{first: many}", "first")):
        status, _, err = invoke(
            "plan",
            "recipe.yaml",
            "--plugin",
            "my_methods.py",
            "--set",
            f"steps.0.rotate={{backwards: {value}}}",
        )
        assert status == 2 and told in err and "Traceback" not in err


def test_a_plugin_cannot_take_a_name_that_is_taken(root: Path) -> None:
    (root / "thief.py").write_text(PLUGIN.replace('"backwards"', '"pca"'))
    status, _, err = invoke("methods", "--plugin", "thief.py")
    assert status == 2 and "the name 'pca' is taken" in err


def test_a_plugin_that_lies_about_its_group_is_caught(root: Path) -> None:
    (root / "liar.py").write_text(PLUGIN.replace("A = torch", "A = 2 * torch"))
    status, _, err = invoke(
        "run",
        "recipe.yaml",
        "--plugin",
        "liar.py",
        "--output",
        "lied",
        "--set",
        "steps.0={spaces: residual, rotate: backwards}",
    )
    assert status == 1 and "outside the group 'orthogonal'" in err and not (root / "lied").exists()


@pytest.mark.parametrize("text", ["raise RuntimeError('mine')", "def broken(:", "1 / 0"])
def test_a_plugin_that_fails_to_import_is_refused_in_one_line(root: Path, text: str) -> None:
    (root / "broken.py").write_text(text)
    status, _, err = invoke("methods", "--plugin", "broken.py")
    assert status == 2 and err.startswith("error: --plugin broken.py") and "Traceback" not in err
