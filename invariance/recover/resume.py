"""What an interrupted recovery left to go on from: one process at a time, and nothing that is damaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..core.errors import InputError
from ..core.locks import Taken, is_helper, keep
from .trainer import BEST, LAST

LOCAL = "local.pt"  # stages that were trained one by one


def begin(work: Path, where: str) -> Path:
    """A recovery's folder in the cache, this process's until it ends; checkpoints in it that cannot be read are removed.

    A disk that filled up leaves such. Raises InputError where another process does the same recovery.
    """
    if is_helper():
        return work
    try:
        keep(work / "lock")
    except Taken:
        raise InputError(
            f"{where}: another process trains the same model on the same text by the same options. Wait for it, or change "
            "`seed`."
        ) from None
    for names in ((LAST, BEST), (LOCAL,)):
        there = [work / name for name in names if (work / name).exists()]
        if not all(map(_is_whole, there)):
            for path in there:
                path.unlink()
    return work


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    return found


def _is_whole(path: Path) -> bool:
    try:
        read(path)
    except Exception:  # zip files that end early, pickles that do: torch raises many kinds
        return False
    return True
