"""What a run's key hangs on: every file of a plugin's package, every file that an option names."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from invariance.compress.execution import Execution
from invariance.method.interfaces import load_plugin
from invariance.recipe.recipe import Recipe
from invariance.study.job import key

METHOD = """\
from dataclasses import dataclass
from invariance import Basis, Group, Rotator
IMPORT
@dataclass(frozen=True)
class FromFile(Rotator, name="from_file"):
    path: str = ""
    produces = Group.PERMUTATION
    def fit(self, space, moments):
        return Basis(space.element(0), None)
"""


def asked(**options: str) -> str:
    step = {"spaces": "mlp", "rotate": {"from_file": options} if options else "from_file"}
    return key(Recipe.from_dict({"model": "m", "steps": [step]}), Execution())


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_file_that_an_option_names_counts_by_its_content(place: Path) -> None:
    (place / "one.py").write_text(METHOD.replace("IMPORT", ""))
    load_plugin(str(place / "one.py"))
    (place / "basis.txt").write_text("a")
    before = asked(path="basis.txt")
    (place / "basis.txt").write_text("b")
    assert asked(path="basis.txt") != before
    (place / "basis.txt").write_text("a")
    assert asked(path="basis.txt") == before
    assert asked(path="~nouser/x") != asked(path="x\0y")  # and no such path is an error


@pytest.mark.parametrize("changed", ["helper.py", "data/table.csv", "__init__.py"])
def test_every_file_of_a_plugins_package_counts(place: Path, changed: str) -> None:
    name = f"package_{abs(hash(changed))}"
    package = place / name
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("from . import methods\n")
    (package / "helper.py").write_text("X = 1\n")
    (package / "data" / "table.csv").write_text("1,2\n")
    (package / "methods.py").write_text(METHOD.replace("IMPORT", "from .helper import X"))
    load_plugin(name)
    before = asked()
    (package / "unrelated").mkdir()
    assert asked() == before
    with (package / changed).open("a") as file:
        file.write("# changed\n")
    assert asked() != before
    del sys.modules[name]


def test_a_file_beside_a_plugin_of_one_file_counts_if_it_is_loaded(place: Path) -> None:
    (place / "beside_it.py").write_text("X = 1\n")
    (place / "never_loaded.py").write_text("X = 1\n")
    (place / "two.py").write_text(METHOD.replace("IMPORT", "from beside_it import X"))
    load_plugin(str(place / "two.py"))
    importlib.import_module("beside_it")
    before = asked()
    (place / "never_loaded.py").write_text("X = 2\n")
    assert asked() == before
    (place / "beside_it.py").write_text("X = 2\n")
    assert asked() != before
