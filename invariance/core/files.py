"""Writing that never leaves half a file: beside its place under another name first, then renamed into it."""

from __future__ import annotations

import ctypes
import functools
import glob
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .locks import Lock, Taken, uninterrupted

if TYPE_CHECKING:
    from torch import Tensor

PART = ".part"  # how folders end that something is being written in
LOCK, NEW, OLD = "lock", "new", "old"  # what such a folder holds


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write a file or folder at; moved to ``path`` if all goes well.

    Until then, what was at ``path`` stays. What a killed process has left of this is cleared.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(short(path))}.*{PART}"):
        with suppress(OSError, Taken):
            clear(left)
    place = Path(tempfile.mkdtemp(prefix=f".{short(path)}.", suffix=PART, dir=path.parent))
    lock = Lock(place / LOCK)
    try:
        yield place / NEW
        put(place / NEW, path, place / OLD)
    finally:
        shutil.rmtree(place, ignore_errors=True)
        lock.release()


def short(path: Path) -> str:
    """A name that tells paths apart and is short enough to be made longer."""
    digest = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:8]
    return path.name if len(os.fsencode(path.name)) <= 200 else f"{path.name[:40]}.{digest}"


def clear(place: Path) -> None:
    """Remove a folder in which nobody is writing any more. Raises Taken where somebody is."""
    lock = Lock(place / LOCK)
    try:
        shutil.rmtree(place)
    finally:
        lock.release()


def put(made: Path, path: Path, aside: Path) -> None:
    """Rename a file or folder to ``path``; a folder that is there is ``aside`` afterwards, or back if that fails."""
    with uninterrupted():
        if not (path.is_dir() and made.is_dir()) or path.is_symlink():
            os.replace(made, path)
        elif exchange(made, path):
            os.replace(made, aside)
        else:
            os.replace(path, aside)
            try:
                os.replace(made, path)
            except BaseException:
                os.replace(aside, path)
                raise


def exchange(a: Path, b: Path) -> bool:
    """Let two paths change places in one step, where the system can do that (Linux)."""
    at_here, renames_exchange = -100, 2
    call = _renameat2()
    args = (at_here, os.fsencode(a), at_here, os.fsencode(b), renames_exchange)
    return call is not None and call(*args) == 0


@functools.cache
def _renameat2() -> Callable[..., int] | None:
    try:
        found: Callable[..., int] = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return None
    return found


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
    from safetensors.torch import (
        save_file,  # which imports torch; commands that answer at once do not
    )

    with replacing(path) as temporary:
        save_file({n: t.contiguous() for n, t in tensors.items()}, temporary, metadata)
