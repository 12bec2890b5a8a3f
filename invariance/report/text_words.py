"""What a report says of its texts: each one's ratio, in calibration and out of it, their mean and the worst."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .evaluate_words import SIDES
from .grid import Grid
from .words import NONE

KINDS = {True: "yes", False: "no", None: NONE}
GROUPS = {"all": "", "calibrated": ", calibrated on", "unseen": ", not calibrated on"}
FAR_APART = (
    1.25  # texts outside calibration lose so many times more than those inside: worth a warning
)


def texts(report: Mapping[str, Any]) -> list[Grid]:
    """One table, where more than one text was measured."""
    found = report.get("texts") or {}
    if len(found.get("each") or {}) < 2:
        return []
    sides = list(found["all"])
    rows = [
        [name, KINDS[text["calibrated"]], *(_times(text["ratio"].get(s)) for s in sides)]
        for name, text in found["each"].items()
    ]
    for which, words in GROUPS.items():
        if which == "all" or (found[which] and found[which] != found["all"]):
            for key, said in (("geometric_mean", "geometric mean"), ("worst", "worst")):
                numbers = (_times((found[which].get(s) or {}).get(key)) for s in sides)
                rows.append([f"{said}{words}", "", *numbers])
    note = "Perplexity over the dense model's, text by text." + warning(report)
    return [Grid(note, ["text", "calibrated", *(SIDES[s] for s in sides)], rows)]


def warning(report: Mapping[str, Any]) -> str:
    """A sentence where texts that did not calibrate lose much more than those that did; else nothing."""
    found = report.get("texts") or {}
    for side, inside in (found.get("calibrated") or {}).items():
        outside = (found.get("unseen") or {}).get(side)
        if outside and outside["geometric_mean"] > FAR_APART * inside["geometric_mean"]:
            return (
                f" On texts that did not calibrate it, the {SIDES[side]} model loses much more: "
                f"{outside['geometric_mean']:.2f}× against {inside['geometric_mean']:.2f}×. Calibrate on a mixture."
            )
    return ""


def _times(value: float | None) -> str:
    return NONE if value is None else f"{value:.3f}×"
