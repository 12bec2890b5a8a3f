"""What a model lost on each text, on texts that calibrated it and on others: ratios, their geometric mean, the worst."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

GROUPS = ("all", "calibrated", "unseen")


@dataclass(frozen=True)
class TextLoss:
    """The perplexities on one text over the dense model's, by side."""

    name: str
    calibrated: bool | None  # whether a source of it calibrated the model; None: unknown
    ratios: Mapping[str, float]


@dataclass(frozen=True)
class Group:
    """Several texts together: no average hides the worst."""

    geometric_mean: float
    worst: float
    worst_text: str

    @classmethod
    def of(cls, ratios: Mapping[str, float]) -> Group:
        """Of ratios by the names of their texts."""
        worst = max(ratios, key=lambda name: ratios[name])
        logs = [math.log(ratio) for ratio in ratios.values()]
        return cls(_exp(sum(logs) / len(logs)), ratios[worst], worst)


@dataclass(frozen=True)
class Texts:
    """All texts of a report."""

    each: tuple[TextLoss, ...]

    @classmethod
    def of(
        cls,
        perplexities: Mapping[str, Mapping[str, Any]],
        sources: Mapping[str, Collection[str]],
        calibrated: Collection[str] | None,
    ) -> Texts:
        """Of a report's perplexities, by name; ``sources`` are the data of each, ``calibrated`` those of calibration."""
        found = []
        for name, measured in perplexities.items():
            reference, *others = measured["loss"]
            ratios = {side: measured[side] / measured[reference] for side in others}
            seen = None if calibrated is None else bool({*sources[name]} & {*calibrated})
            known = {side: ratio for side, ratio in ratios.items() if ratio > 0}  # NaN is not
            found.append(TextLoss(name, seen, known))
        return cls(tuple(found))

    def group(self, which: str, side: str) -> Group | None:
        """Those texts that were measured of a side: all, those that calibrated, those that did not."""
        wanted = {"all": (True, False, None), "calibrated": (True,), "unseen": (False,)}[which]
        texts = [t for t in self.each if t.calibrated in wanted and side in t.ratios]
        return Group.of({t.name: t.ratios[side] for t in texts}) if texts else None

    def sides(self) -> list[str]:
        """Those that are compared with the dense model."""
        return list(dict.fromkeys(side for text in self.each for side in text.ratios))

    def to_dict(self) -> dict[str, Any]:
        """As the report has it: ``each`` text, then the groups by side."""
        each = {t.name: {"calibrated": t.calibrated, "ratio": dict(t.ratios)} for t in self.each}
        made: dict[str, Any] = {"each": each}
        for which in GROUPS:
            found = {side: self.group(which, side) for side in self.sides()}
            made[which] = {side: dict(g.__dict__) for side, g in found.items() if g}
        return made


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def texts(
    perplexities: Mapping[str, Mapping[str, Any]],
    sources: Iterable[tuple[str, Collection[str]]],
    calibrated: Collection[str] | None,
) -> dict[str, Any]:
    """The report's part ``texts``."""
    return Texts.of(perplexities, dict(sources), calibrated).to_dict()
