"""Runs that a study has kept: what is damaged counts as not there."""

from __future__ import annotations

from pathlib import Path

from ..core.errors import InputError
from ..report import reading


def is_done(folder: Path) -> bool:
    """Whether a run's folder holds a report that can be read."""
    try:
        reading.read(folder)
    except InputError:
        return False
    return True


def spectra_of(folder: Path) -> dict[str, list[float]]:
    """The energies of a run, which are there to look at: none where they cannot be read."""
    try:
        return reading.read_spectra(folder)
    except InputError:
        return {}
