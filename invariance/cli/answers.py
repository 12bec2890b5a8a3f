"""What `plan` and `inspect` answered, kept by all that it hangs on: asked again, it needs neither torch nor seconds."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..core.cache import cache_dir, hashed
from ..core.sealed import read_kept_json, write_kept_json
from ..io.packaged import PACKAGED

PACKAGES = ("torch", "transformers")
LARGEST = 2**20  # bytes of a recipe


@dataclass(frozen=True)
class Question:
    """A command, the file that it reads, and what else it was asked."""

    command: str
    file: Path | None
    others: Sequence[str]

    def kept(self) -> Path:
        """Where the answer lies. Raises OSError where the file is none that can be read, or too large for a recipe."""
        digest = None
        if self.file is not None:
            if not self.file.is_file() or self.file.stat().st_size > LARGEST:
                raise OSError
            digest = hashlib.sha256(self.file.read_bytes()).hexdigest()
        name = hashed(self.command, str(self.file), digest, self.others, _program())
        return cache_dir("answers") / f"{name}.json"

    def recall(self) -> dict[str, Any] | None:
        """The answer of before, where the model is still the same; None where it must be found."""
        try:
            found = read_kept_json(self.kept())
        except OSError:  # whoever answers says what is wrong with the file
            return None
        if found is None or found["is"] is None or found["is"] != stamp(found["answer"]["model"]):
            return None
        answer: dict[str, Any] = found["answer"]
        return answer

    def keep(self, answer: dict[str, Any]) -> dict[str, Any]:
        write_kept_json(self.kept(), {"is": stamp(answer["model"]), "answer": answer})
        return answer


def answer(question: Question, find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was answered before, else what is found now."""
    known = question.recall()
    return question.keep(find()) if known is None else known


def stamp(model: str) -> Any:
    """What tells a model's files from others without reading them; None of a hub id, which may have changed there."""
    if model.startswith("packaged:"):
        known = PACKAGED.get(model.removeprefix("packaged:"))
        return None if known is None else known.digest
    try:
        path = Path(model).expanduser().resolve(strict=True)
        return [str(path), *_files(path if path.is_dir() else path.parent, "*")]
    except (OSError, RuntimeError, ValueError):
        return None


def _files(folder: Path, pattern: str) -> list[Any]:
    files = [(f, f.stat()) for f in sorted(folder.glob(pattern)) if f.is_file()]
    return [[str(f), about.st_size, about.st_mtime_ns] for f, about in files]


@cache
def _program() -> list[Any]:
    """This package as it is, the libraries that it asks, and the methods of others that are installed beside it."""
    methods = importlib.metadata.entry_points(group="invariance.methods")
    others = [[e.value, None if e.dist is None else e.dist.version] for e in methods]
    versions = [importlib.metadata.version(name) for name in PACKAGES]
    found = importlib.util.find_spec("invariance.methods")
    shipped = [] if found is None else found.submodule_search_locations or []
    folders = (Path(__file__).parents[1], *map(Path, shipped))
    return [versions, others, *(_files(folder, "**/*.py") for folder in folders)]
