"""Processes that are killed or interrupted at any moment: the old output until the new one is there, then no leftovers."""

from __future__ import annotations

import json
import os
import random
import signal
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from folders import invoke, save_model, workplace
from safetensors.torch import load_file

from invariance.core import manifest

PACKAGE = str(Path(manifest.__file__).parents[1])
MOMENTS = int(os.environ.get("INVARIANCE_KILLS", "2"))  # of each command and signal; 60 by hand
RECIPE = """\
model: model
calibrate: {data: tokens.npy, dtype: float32}
steps:
  - {spaces: mlp, select: {uniform: {width: WIDTH}}}
evaluate: [{perplexity: {data: tokens.npy}}]
"""
STUDY = """\
base: wide.yaml
grid: {steps.0.select.uniform.width: [24, 32]}
"""
RECOVER = ("--set", "train.data=tokens.npy", "--set", "batch=2", "--set", "held_out=4")
COMMANDS: dict[str, tuple[str, ...]] = {
    "run": ("run", "wide.yaml", "--output", "out/here"),
    "run --overwrite": ("run", "narrow.yaml", "--output", "out/here", "--overwrite"),
    "recover": ("recover", "model", "--output", "out/here", *RECOVER),
    "ablate": ("ablate", "study.yaml", "--output", "out/here"),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("kills")
    with workplace(root, sequences=12):
        save_model(root / "model")
        for name, width in (("wide", 48), ("narrow", 24)):
            (root / f"{name}.yaml").write_text(RECIPE.replace("WIDTH", str(width)))
        (root / "study.yaml").write_text(STUDY)
        yield root


def forked(arguments: tuple[str, ...]) -> int:
    """A process of its own that carries a command out; imported modules are there already."""
    child = os.fork()
    if child:
        return child
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.setsid()
        status, _, _ = invoke(*arguments)
    except KeyboardInterrupt as e:  # not the command's fault where it came before or behind it
        inside = any(f.filename.startswith(PACKAGE) for f in traceback.extract_tb(e.__traceback__))
        status = 99 if inside else 130
    except BaseException:
        status = 99
    os._exit(status)


def ended(child: int) -> int:
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def results(folder: Path) -> dict[str, Any]:
    """What must be the same however often a command was stopped: numbers, weights, names of files."""
    found: dict[str, Any] = {
        "files": sorted(n for n, _ in manifest.entries(folder) if "/csv-" not in n)
    }
    for name, path in manifest.entries(folder):
        if path.suffix == ".safetensors":
            found |= {f"{name} {key}": value.tolist() for key, value in load_file(path).items()}
        if path.name == "report.json":
            report = json.loads(path.read_text())
            found[name] = [
                report[key] for key in ("perplexity", "parameters", "widths", "exactness")
            ]
        if path.name == "recover.json":
            found[name] = json.loads(path.read_text())["recover"]["held_out"]
    return found


@pytest.fixture(scope="module")
def expected(root: Path) -> dict[str, tuple[dict[str, Any], float]]:
    """What each command gives where nothing stops it, and how long it takes."""
    found = {}
    for name, arguments in COMMANDS.items():
        if "--overwrite" not in arguments:
            clean(root)
        start = time.monotonic()
        status = ended(forked(arguments))
        assert status == 0, (name, invoke(*arguments))
        found[name] = results(root / "out" / "here"), time.monotonic() - start
        if name == "run":
            found["before"] = found[name]
    return found


def clean(root: Path) -> None:
    """An empty place, and no caches."""
    import shutil

    for name in ("out", "cache"):
        shutil.rmtree(root / name, ignore_errors=True)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=lambda s: s.name)
@pytest.mark.parametrize("command", COMMANDS)
def test_stopped_at_any_moment_the_old_output_stays_and_the_next_run_is_as_if_nothing_had_been(
    root: Path,
    expected: dict[str, tuple[dict[str, Any], float]],
    command: str,
    how: signal.Signals,
) -> None:
    draw = random.Random(f"{command} {how}")
    wanted, seconds = expected[command]
    output = root / "out" / "here"
    for _ in range(MOMENTS):
        clean(root)
        if command == "run --overwrite":
            assert ended(forked(COMMANDS["run"])) == 0
        child = forked(COMMANDS[command])
        time.sleep(draw.uniform(0, 1.05 * seconds))
        os.kill(child, how)
        status = ended(child)
        assert status in ((-how, 0) if how == signal.SIGKILL else (130, 0)), status
        if command == "run --overwrite":
            assert results(output) in (expected["before"][0], wanted)
        elif command != "ablate":
            assert not output.exists() or results(output) == wanted
        if how == signal.SIGINT:  # which had the time to clear up
            assert left(root) == []
        again = COMMANDS[command]
        if output.exists() and "--overwrite" not in again and command != "ablate":
            continue
        assert ended(forked(again)) == 0, invoke(*again)
        assert results(output) == wanted
        assert left(root) == []


def left(root: Path) -> list[str]:
    """What no command should leave: anything hidden, or half written."""
    return (
        [name for name, path in manifest.entries(root / "out") if path.name.startswith(".")]
        if (root / "out").exists()
        else []
    )
