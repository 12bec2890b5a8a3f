"""Writing that never leaves half a file: to a temporary name first, then into place."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` to write a file or folder at; moved into place if all goes well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield temporary / path.name
        made = temporary / path.name
        if path.is_dir() and made.is_dir():  # a folder cannot replace a full one in one step
            old = temporary / "old"
            os.replace(path, old)
        os.replace(made, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def beside(model: str, name: str) -> Path | None:
    """A file that belongs to a checkpoint: in its folder, or in the one above where a run has put it as ``model/``."""
    folder = Path(os.path.abspath(model))
    places = [folder, folder.parent] if folder.name == "model" else [folder]
    return next((p / name for p in places if folder.is_dir() and (p / name).is_file()), None)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def finite(value: Any) -> Any:
    """Plain data with None for the numbers that JSON does not know: infinite ones, and those that are not numbers."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any) -> None:
    value = finite(value)
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    with replacing(path) as temporary:
        save_file({n: t.contiguous() for n, t in tensors.items()}, temporary, metadata)
