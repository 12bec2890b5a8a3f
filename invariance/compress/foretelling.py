"""What a run's cuts are foretold to lose: by gradients of the model before the first cut, change by change."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from ..core.change import Change
from . import predict
from .bases import Bases, Cuts
from .calibration import timed
from .demand import Widths
from .predict import Foretold, foretell, narrowed, told_by


class Foretelling:
    """The loss of the widths that a run cuts to, added up while it cuts, and of the narrower members in them."""

    def __init__(self, bases: Bases) -> None:
        self.bases, self.plan, self.calibration = bases, bases.plan, bases.calibration
        self.gradients: predict.Gradients | None = None
        self.lost: predict.Lost | None = None

    def begin(self, choices: Sequence[Widths], chosen: Widths) -> None:
        """Before the first cut: measure what is to tell the loss of any of the choices."""
        self._measure(choices)
        self.lost = self._nothing_lost(chosen)

    def add(self, name: str, change: Change) -> None:
        """A change that is made."""
        if self.lost is not None:
            self.lost.add(name, change)

    def of(self, chosen: Widths) -> Foretold:
        """What the widths that were cut to lose, by all changes that were made."""
        return self._foretell(chosen, self.lost)

    def of_member(self, widths: Widths) -> Foretold:
        """What a narrower member would lose, by the changes that would make it."""
        with timed(self.calibration.seconds, "predict"):
            lost = self._nothing_lost(widths)
            if lost is not None:
                for name, change in Cuts(self.bases, widths).of(self.bases.unit_of).items():
                    lost.add(name, change)
            return self._foretell(widths, lost)

    def _nothing_lost(self, widths: Widths) -> predict.Lost | None:
        return None if self.gradients is None else predict.Lost(self.gradients, widths)

    def _foretell(self, widths: Widths, lost: predict.Lost | None) -> Foretold:
        nats = float("nan") if lost is None else lost.nats
        return foretell(self.plan.units, widths, self.bases.spectra, lambda: nats)

    def _measure(self, choices: Sequence[Widths]) -> None:
        """Measure the gradients of the model, which is not cut yet, where they are to tell what widths lose."""
        units, tokens = self.plan.units, self.calibration.tokens
        if tokens is None or not any(told_by(units, widths) == "gradients" for widths in choices):
            return
        assert self.plan.recipe.calibrate is not None
        changing = [
            u for u in units if u.slice is not None or any(u in narrowed(units, w) for w in choices)
        ]
        spaces = [m for u in changing for m in u.members]
        skip = self.plan.recipe.calibrate.skip
        key = ("gradients", *self.bases.source(), tokens.digest(), skip, *spaces)
        parts, progress = self.calibration.parts, self.calibration.progress
        with timed(self.calibration.seconds, "predict"):
            make = partial(predict.measure, parts, spaces, tokens, progress, skip=skip)
            self.gradients = self.bases.memo.once(key, make, lambda found: found.nbytes)
