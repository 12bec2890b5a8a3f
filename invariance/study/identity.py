"""What a run's numbers hang on beside its recipe: every file that it names, and every file of methods that do not ship."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..recipe.recipe import Recipe

WHOLE = 2**26  # bytes of a file that is hashed; of larger ones, size and time tell
SOURCES = ("model", "data", "names")  # what names local files or folders elsewhere in a recipe


def files(recipe: Recipe) -> list[Any]:
    """What stands for the local files that a recipe names, those in options of methods included."""
    found = recipe.to_dict()
    named = {*_named(found), *_texts(found["steps"])}
    return [stamp for name in sorted(named) for stamp in _stamps(name)]


def sources(recipe: Recipe) -> list[str]:
    """Hashes of all files of the packages whose methods do not ship, so that a changed method is run again."""
    modules = {type(m).__module__ for step in recipe.steps for m in step.methods.values()}
    outside = {m for m in modules if not m.startswith("invariance.")}
    return sorted(_digest(f) for f in {f for m in outside for f in _of_package(m)})


def _of_package(module: str) -> Iterator[Path]:
    """The files of the package that a module belongs to; of a single file, also those beside it that are loaded."""
    top = sys.modules.get(module.partition(".")[0])
    own = getattr(sys.modules.get(module), "__file__", None)
    if top is not None and getattr(top, "__path__", None):
        for folder in map(Path, top.__path__):
            yield from (f for f in sorted(folder.rglob("*")) if _counts(f))
        return
    if own is None:
        return
    yield Path(own)
    for other in list(sys.modules.values()):
        file = getattr(other, "__file__", None)
        if file and Path(file).is_relative_to(Path(own).parent) and _counts(Path(file)):
            yield Path(file)


def _counts(path: Path) -> bool:
    return path.is_file() and "__pycache__" not in path.parts and "site-packages" not in path.parts


def _named(value: Any, key: str = "") -> Iterator[str]:
    """What may be local files in a recipe: its model, data, and tasks."""
    if isinstance(value, str) and key in SOURCES:
        yield value
    elif isinstance(value, dict):
        for k, child in value.items():
            yield from _named(child, k)
    elif isinstance(value, list):
        for child in value:
            yield from _named(child, key)


def _texts(value: Any) -> Iterator[str]:
    """Every word in plain data."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        inside: Iterable[Any] = value.values() if isinstance(value, dict) else value
        for child in inside:
            yield from _texts(child)


def _stamps(name: str) -> list[Any]:
    """Names and contents of a local file, or of those in a folder; nothing of what is not there."""
    try:
        path = Path(name).expanduser()
        there = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
        return [(f.name, _digest(f)) for f in there if f.is_file()]
    except (OSError, RuntimeError, ValueError):  # no path at all
        return []


def _digest(path: Path) -> str:
    found = path.stat()
    if found.st_size > WHOLE:
        return f"{found.st_size} {found.st_mtime_ns}"
    return hashlib.sha256(path.read_bytes()).hexdigest()
