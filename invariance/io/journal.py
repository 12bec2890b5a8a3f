"""The journal of a checkpoint that is being written: which steps are done, and by which bytes that can be told."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..core.files import write_text
from .kept import file_digest

JOURNAL, SCRATCH = "journal.jsonl", "scratch"


def begin(place: Path, key: str, steps: Sequence[Mapping[str, Any]]) -> None:
    """A journal of the work that ``key`` names, with the steps that stand."""
    write_text(place / JOURNAL, "".join(json.dumps(line) + "\n" for line in ({"key": key}, *steps)))


def note(place: Path, step: str, parts: Iterable[Path], needs: Iterable[Path]) -> None:
    """A step is done: ``parts`` of the checkpoint are its work; ``needs``, in the scratch folder, what the next needs."""
    line = {
        "step": step,
        "parts": {p.name: file_digest(p, cached=False) for p in parts},
        "needs": {str(p.relative_to(place / SCRATCH)): file_digest(p, cached=False) for p in needs},
    }
    with (place / JOURNAL).open("a", encoding="utf-8") as journal:
        journal.write(json.dumps(line) + "\n")


def resumed(place: Path, key: str) -> list[dict[str, Any]]:
    """The steps that stand: of this work, parts intact, up to the last one that can be gone on from."""
    steps, whole = list[dict[str, Any]](), 0
    for n, line in enumerate(_lines(place / JOURNAL)):
        if n == 0:
            if line.get("key") != key:
                return []
        elif _intact(place, line["parts"]):
            steps.append(line)
            whole = len(steps) if _intact(place / SCRATCH, line["needs"]) else whole
        else:
            break
    return steps[:whole]


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a journal, up to one that was cut off."""
    try:
        with path.open(encoding="utf-8") as journal:
            for line in journal:
                found = json.loads(line)
                if not line.endswith("\n") or not isinstance(found, dict):
                    return
                yield found
    except (OSError, ValueError):
        return


def _intact(folder: Path, sums: Mapping[str, str]) -> bool:
    return all(
        (folder / name).is_file() and file_digest(folder / name, cached=False) == known
        for name, known in sums.items()
    )
