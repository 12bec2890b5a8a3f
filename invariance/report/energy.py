"""Energy cut: the share of a basis that lies beyond a width, by space and by block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from .units import block


def by_block(values: Mapping[str, float]) -> list[float | None]:
    """The mean of spaces' values in each block."""
    found: dict[int, list[float]] = {}
    for name, value in values.items():
        found.setdefault(block(name), []).append(value)
    return [fmean(found[n]) if n in found else None for n in range(max(found, default=-1) + 1)]


def energy_lost(
    spectra: Mapping[str, Sequence[float]], widths: Mapping[str, int]
) -> dict[str, float]:
    """The share of each basis's energy that lies beyond its cut; bases whose energies say nothing are left out."""
    found = {}
    for name, energies in spectra.items():
        whole = sum(energies)
        if name in widths and widths[name] < len(energies) and whole > 0 and len(set(energies)) > 1:
            found[name] = sum(energies[widths[name] :]) / whole
    return found
