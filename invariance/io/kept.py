"""Folders of the cache that are made once, with checksums; and the hashes of files."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from ..core.cache import cache_dir
from ..core.files import replacing, write_json
from ..core.sealed import read_kept_json, write_kept_json

SUMS = "checksums.json"


def keep(folder: Path, make: Callable[[Path], None]) -> None:
    """A folder of the cache: made whole or not at all, and again where its files are no longer those that were made.

    One that an earlier version made, which wrote no checksums, is taken as it is.
    """
    if _unchanged(folder):
        return
    if folder.is_dir() and not (folder / SUMS).exists():
        _sign(folder)
        return
    shutil.rmtree(folder, ignore_errors=True)
    with replacing(folder) as made:
        make(made)
        _sign(made)


def _sign(folder: Path) -> None:
    files = sorted(f for f in folder.iterdir() if f.is_file())
    write_json(folder / SUMS, {f.name: file_digest(f, cached=False) for f in files})


def _unchanged(folder: Path) -> bool:
    try:
        sums = json.loads((folder / SUMS).read_text(encoding="utf-8"))
        return all(file_digest(folder / name) == known for name, known in sums.items())
    except (OSError, ValueError, AttributeError):
        return False


def file_digest(path: Path, *, cached: bool = True) -> str:
    """The sha256 of a file, computed once for a name, a size and a time of change."""
    about = path.resolve().stat()
    key = hashlib.sha256(
        json.dumps([str(path.resolve()), about.st_size, about.st_mtime_ns]).encode()
    ).hexdigest()
    memo = cache_dir("digests") / f"{key}.json"
    if cached and (known := read_kept_json(memo)) is not None:
        return str(known)
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if cached:
        write_kept_json(memo, found)
    return found
