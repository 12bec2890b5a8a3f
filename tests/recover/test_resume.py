"""What an interrupted recovery left: damaged checkpoints are done again, and two at once are one too many."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from invariance.core.errors import InputError
from invariance.recover.resume import begin
from invariance.recover.trainer import BEST, LAST


@pytest.mark.parametrize("length", [0, 1, 100, -1])
@pytest.mark.parametrize("spoilt", [LAST, BEST])
def test_checkpoints_that_end_early_are_removed(tmp_path: Path, length: int, spoilt: str) -> None:
    for name in (LAST, BEST, "local.pt"):
        torch.save({"state_dict": {"a": torch.ones(100)}}, tmp_path / name)
    whole = (tmp_path / spoilt).read_bytes()
    (tmp_path / spoilt).write_bytes(whole[:length])
    begin(tmp_path, "recover")
    assert {p.name for p in tmp_path.iterdir()} == {"local.pt", "lock"}


def test_checkpoints_that_are_whole_stay(tmp_path: Path) -> None:
    for name in (LAST, BEST):
        torch.save({"step": 1}, tmp_path / name)
    begin(begin(tmp_path, "recover"), "recover")
    assert (tmp_path / LAST).is_file() and (tmp_path / BEST).is_file()


def test_the_same_recovery_twice_at_once_is_refused(tmp_path: Path) -> None:
    code = (
        "import time\nfrom pathlib import Path\nfrom invariance.core.locks import keep\n"
        f"keep(Path({str(tmp_path / 'lock')!r}))\nprint('ready', flush=True)\ntime.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(InputError, match="another process trains the same"):
            begin(tmp_path, "recover")
        other.kill()
    begin(tmp_path, "recover")
