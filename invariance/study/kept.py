"""Runs that a study has kept: read through one checked form, and what is damaged counts as not there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..core.errors import InputError

Number = Annotated[float, Field(allow_inf_nan=True)]


class Loose(BaseModel):
    """Reports hold more than is read of them here."""

    model_config = ConfigDict(extra="allow", strict=True)


class Named(Loose):
    name: str
    stock: bool


class Counted(Loose):
    total: int
    blocks: int
    embedding: int
    head: int
    shortcuts: int


class Parameters(Loose):
    dense: Counted
    sliced: Counted


class Sides(Loose):
    dense: Number | None
    sliced: Number | None


class Predicted(Loose):
    loss: Number | None
    measured: Number | None


class Exactness(Loose):
    relative_error: Number | None


class Kept(Loose):
    """What a study reads of the report of a run."""

    model: Named
    parameters: Parameters
    flops_per_token: Sides
    kv_bytes_per_token: Sides
    perplexity: dict[str, dict[str, Any]]
    predicted: Predicted
    tokens_per_second: Sides
    exactness: Exactness
    seconds: dict[str, Number]
    versions: dict[str, str]


def read_report(folder: Path) -> dict[str, Any]:
    """The report of a run. Raises InputError, with file and key, where it is damaged."""
    path = folder / "report.json"
    found = read_json(path)
    try:
        Kept.model_validate(found)
    except ValidationError as e:
        error = e.errors()[0]
        key = ".".join(map(str, error["loc"])) or "the report"
        raise InputError(f"{path}: {key}: {error['msg'].lower()}") from None
    return dict(found)


def read_json(path: Path) -> Any:
    """Plain data from a file. Raises InputError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise InputError(f"{path}: cannot be read ({' '.join(str(e).split())[:200]})") from None


def read_spectra(folder: Path) -> dict[str, list[float]]:
    """The energies beside a report; none where they are damaged, as they are there to be looked at only."""
    try:
        found = read_json(folder / "spectra.json")
    except InputError:
        return {}
    whole = isinstance(found, Mapping) and all(
        isinstance(e, list) and all(isinstance(x, int | float | None) for x in e)
        for e in found.values()
    )
    return dict(found) if whole else {}


def is_done(folder: Path) -> bool:
    """Whether a run's folder holds a report that can be read."""
    try:
        read_report(folder)
    except InputError:
        return False
    return True
