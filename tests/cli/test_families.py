"""`invariance families` on the command line: the page that it writes, and what it leaves alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from folders import invoke


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_what_is_not_its_own_page_is_refused_before_any_work(kind: str, tmp_path: Path) -> None:
    notes = tmp_path / "notes.md"
    if kind == "folder":
        notes.mkdir()
    elif kind == "link":
        notes.symlink_to(tmp_path / "gone")
    else:
        notes.write_text("mine")
    status, _, err = invoke("families", "llama", "--output", notes)
    assert status == 2 and "--output" in err
    assert kind != "file" or notes.read_text() == "mine"


def test_ctrl_c_does_not_wait_for_the_types_that_are_left() -> None:
    """Of all types, which take half an hour; it reaches every process of the terminal."""
    command = [sys.executable, "-m", "invariance", "families", "--jobs", "1"]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a child ignores what we do
    try:
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, process_group=0)
    finally:
        signal.signal(signal.SIGINT, before)
    with process:
        assert process.stderr is not None
        assert process.stderr.readline()  # of the first type
        os.killpg(process.pid, signal.SIGINT)
        try:
            assert process.wait(timeout=60) == 130
        finally:
            process.kill()
        assert "stopped" in process.stderr.read()
