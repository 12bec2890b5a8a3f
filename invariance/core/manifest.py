"""Which files in a folder we wrote, and with what content: nothing else is ever replaced or removed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

NAME = "manifest.json"


class Manifest(BaseModel):
    """The files of a folder by their path within it, each with the SHA-256 of its content: two while it is replaced."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    made_by: str = "invariance"
    files: dict[str, tuple[str, ...]]

    def to_text(self) -> str:
        return json.dumps(self.model_dump(), indent=1) + "\n"


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def entries(folder: Path) -> Iterator[tuple[str, Path]]:
    """All that is in a folder and below it, folders in front of what they hold. Links are not followed."""
    for each in sorted(os.scandir(folder), key=lambda entry: entry.name):
        path = Path(each.path)
        yield each.name, path
        if each.is_dir(follow_symlinks=False):
            yield from ((f"{each.name}/{name}", below) for name, below in entries(path))


def seal(folder: Path) -> None:
    """Write down what is in a folder, all of which we have written."""
    files: dict[str, tuple[str, ...]] = {
        name: (sha256(path),) for name, path in entries(folder) if path.is_file()
    }
    (folder / NAME).write_text(Manifest(files=files).to_text(), encoding="utf-8")


def read(folder: Path) -> Manifest | None:
    """What we wrote into a folder; None where no manifest says so."""
    try:
        return Manifest.model_validate_json((folder / NAME).read_bytes())
    except (OSError, ValidationError):
        return None


def is_empty(folder: Path) -> bool:
    return next(iter(os.scandir(folder)), None) is None


def not_ours(folder: Path) -> str | None:
    """The first thing in a folder that we did not write, or that has changed since, in words; None where all is ours."""
    made = read(folder)
    if made is None:
        first = min(entry.name for entry in os.scandir(folder))
        return f"'{first}', and no {NAME} says that we wrote it"
    return _first_foreign(folder, made.files)


def _first_foreign(folder: Path, files: Mapping[str, tuple[str, ...]]) -> str | None:
    ours = {NAME, *files}
    folders = {
        "/".join(name.split("/")[:n]) for name in files for n in range(1, name.count("/") + 1)
    }
    for name, path in entries(folder):
        if path.is_symlink() or path.is_mount():
            return f"'{name}', which lies elsewhere"
        if path.is_dir():
            if name not in folders:
                return f"the folder '{name}', which we did not make"
        elif name not in ours or not path.is_file():
            return f"'{name}', which we did not write"
        elif name != NAME and sha256(path) not in files[name]:
            return f"'{name}', which has changed since we wrote it"
    return None
