"""Reports from disk: whatever is damaged is refused with its file and key."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from ..core.errors import InputError
from .document import Report
from .units import Number

GIVE = "Give the folder that `invariance run` wrote; if this is one, run its recipe again."
M = TypeVar("M", bound=BaseModel)


def checked(model: type[M], found: Any, where: str, otherwise: str = GIVE) -> M:
    """Plain data as a model of it. Raises InputError that names the first key that cannot be."""
    try:
        return model.model_validate(found)
    except ValidationError as e:
        first = e.errors()[0]
        key = ".".join(str(k) for k in first["loc"]) or "the whole file"
        got = str(first["input"])
        said = f"{got[:60]}…" if len(got) > 60 else got
        what = "is missing" if first["type"] == "missing" else f"{first['msg']}, got {said!r}"
        raise InputError(f"{where}: {key}: {what[:1].lower() + what[1:]}. {otherwise}") from None


def load(file: Path, otherwise: str = GIVE) -> Any:
    """What a file of JSON holds. Raises InputError."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as e:
        raise InputError(f"{file}: {e.strerror}. {otherwise}") from None
    except (ValueError, RecursionError) as e:
        raise InputError(f"{file}: not valid JSON ({e}). {otherwise}") from None


def read(path: Path) -> Report:
    """The report of a run's folder, or of a file. Raises InputError."""
    file = path / "report.json" if path.is_dir() else path
    return checked(Report, load(file), str(file))


Spectra = Mapping[str, Sequence[float]]  # a unit's first space → its energies, falling
_SPECTRA: TypeAdapter[dict[str, list[Number]]] = TypeAdapter(dict[str, list[Number]])


def read_spectra(path: Path) -> dict[str, list[float]]:
    """The energies beside a report; none where no file lies there. Raises InputError."""
    file = (path if path.is_dir() else path.parent) / "spectra.json"
    if not file.is_file():
        return {}
    otherwise = "Remove it, or run again."
    try:
        found = _SPECTRA.validate_python(load(file, otherwise), strict=True)
    except ValidationError as e:
        key = ".".join(str(k) for k in e.errors()[0]["loc"][:2]) or "the whole file"
        raise InputError(f"{file}: {key}: not a list of numbers. {otherwise}") from None
    return {n: [math.nan if v is None else v for v in values] for n, values in found.items()}
