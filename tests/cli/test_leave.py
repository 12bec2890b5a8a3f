"""Where errors leave: every one is a line and an exit status, whatever raised it, whatever the terminal can print."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import typer
from folders import invoke, save_model, types_forgotten
from safetensors import SafetensorError
from transformers import AutoConfig

from invariance.cli import commands
from invariance.cli.leave import leaving, print_anything
from invariance.core.errors import CertificateError, InputError
from invariance.model.families import declared

FAULTS: dict[str, tuple[BaseException, int, str]] = {
    "input": (InputError("r.yaml:1: [no]"), 2, "error: r.yaml:1: [no]"),
    "certificate": (CertificateError("not exact"), 1, "error: not exact"),
    "memory": (MemoryError(), 1, "memory ran out"),
    "torch's memory": (
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4096 bytes."),
        1,
        "memory ran out: 4096 bytes",
    ),
    "a device's memory": (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        1,
        "memory ran out: 20.00 GiB",
    ),
    "full": (OSError(errno.ENOSPC, "No space left on device", "/out"), 1, "the disk is full: /out"),
    "full, in Rust": (
        SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        ),
        1,
        "the disk is full",
    ),
    "a file that went away": (
        FileNotFoundError(errno.ENOENT, "No such file", "x"),
        1,
        "x: No such",
    ),
    "too deep": (RecursionError("maximum recursion depth"), 1, "something is nested too deeply"),
    "ours": (AssertionError(), 1, "unexpected AssertionError: no message. This is a fault of the"),
    "Ctrl-C": (KeyboardInterrupt(), 130, "stopped"),
    "safetensors": (SafetensorError("header too large"), 1, "unexpected SafetensorError: header"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_error_leaves_as_a_line_and_a_status(
    fault: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    raised, status, says = FAULTS[fault]
    app = typer.Typer()
    monkeypatch.setattr(commands, "app", app)

    @commands.command
    def fails() -> None:
        raise raised

    monkeypatch.setattr(sys, "argv", ["invariance"])
    with pytest.raises(SystemExit) as left:
        commands.main()
    told = " ".join(capsys.readouterr().err.split())
    assert left.value.code == status
    assert told.startswith(says if says.startswith(("error", "stopped")) else f"error: {says}")
    assert "Traceback" not in told


def test_ctrl_c_before_a_command_begins_leaves_the_same_way(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def importing() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as left:
        leaving(importing)
    assert left.value.code == 130
    assert capsys.readouterr().err.startswith("stopped")


def test_what_reads_our_output_may_stop(tmp_path: Path) -> None:
    code = "from invariance.cli.leave import leaving\nleaving(lambda: print('x' * 10**6))"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as program:
        assert program.stdout is not None and program.stderr is not None
        program.stdout.close()
        assert b"Traceback" not in program.stderr.read() and program.wait() == 1


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_what_a_terminal_cannot_print_is_no_error(encoding: str) -> None:
    code = (
        "import sys\nfrom invariance.cli.terminal import out, err, say\n"
        "from invariance.cli.leave import leaving\nfrom rich.table import Table\n"
        "table = Table('Σ', 'b', title='перплексия → ●')\ntable.add_row('\\udc80', '日本')\n"
        "leaving(lambda: (say({}, False, table, '→'), err.print('●'), print('ü')))"
    )
    environment = os.environ | {"PYTHONIOENCODING": encoding, "COLUMNS": "60"}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert ran.returncode == 0 and ran.stderr.strip() and b"Traceback" not in ran.stderr


def test_the_module_is_the_program() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "invariance", "run", "gone.yaml"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )
    assert ran.returncode == 2 and ran.stdout == ""
    assert ran.stderr.startswith("error: gone.yaml: no such file")


def test_streams_that_are_no_terminal_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    print_anything()
    leaving(lambda: None)


# --- Plugins.


MINE = """
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

class MineConfig(LlamaConfig):
    model_type = "mine"

class Mine(LlamaForCausalLM):
    config_class = MineConfig

AutoConfig.register("mine", MineConfig, exist_ok=True)
AutoModelForCausalLM.register(MineConfig, Mine, exist_ok=True)
"""


@pytest.fixture
def family(tmp_path: Path) -> Iterator[Path]:
    """A plugin that registers a model."""
    path = tmp_path / "registers.py"
    path.write_text(MINE)
    with types_forgotten():
        yield path


@pytest.mark.parametrize("name", [c.callback.__name__ for c in commands.app.registered_commands])
def test_every_command_takes_plugins(name: str) -> None:
    status, out, _ = invoke(name, "--help")
    assert status == 0 and "--plugin" in out


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_family_may_come_as_a_plugin(command: str, tmp_path: Path, family: Path) -> None:
    save_model(tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace('"llama"', '"mine"'))
    for _ in range(2):  # a process that has it already says the same
        status, _, err = invoke(command, tmp_path / "model", "--plugin", family)
        assert status == 0, err
    assert declared(AutoConfig.for_model("mine"))


PLUGINS: dict[str, tuple[str, str]] = {
    "nothing": ("x = 1\n", "registers no method and no model"),
    "raises": ("1 / 0\n", "division by zero"),
    "exits": ("raise SystemExit(3)\n", "cannot be imported"),
    "is no Python": ("def (\n", "cannot be imported"),
}


@pytest.mark.parametrize("case", PLUGINS)
def test_plugins_that_do_nothing_are_refused(case: str, tmp_path: Path) -> None:
    text, says = PLUGINS[case]
    (tmp_path / "plugin.py").write_text(text)
    status, out, err = invoke("methods", "--plugin", tmp_path / "plugin.py")
    assert (status, out) == (2, "") and says in " ".join(err.split())
