"""The held-out loss of widths, for selectors that measure; remembered on disk, so that a search goes on where it was."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ..core.change import Change
from ..core.errors import InputError
from ..core.progress import Progress
from ..core.sealed import read_kept_json, write_kept_json
from ..io.data import Tokens
from ..measure.losses import perplexity
from ..model.copies import copy_in
from ..model.layout import Layout
from ..model.reparametrize import reparametrize
from .demand import Unit

HELD_OUT = 8  # the last one of so many calibration sequences measures widths, and takes no part in the calibration


def split(tokens: Tokens, where: str) -> tuple[Tokens, Tokens]:
    """The sequences to calibrate on, and those to measure losses on. Raises InputError where they are too few."""
    count, length = tokens.ids.shape
    enough_held_out(count if length > 1 else 0, where)
    n = count - count // HELD_OUT
    return Tokens(tokens.ids[:n], tokens.mask[:n]), Tokens(tokens.ids[n:], tokens.mask[n:])


def enough_held_out(sequences: int, where: str) -> None:
    """Raises InputError where so many sequences cannot be divided."""
    if sequences < HELD_OUT:
        raise InputError(
            f"{where}: {sequences} sequences of 2 tokens or more, and a selector that measures losses holds out one in "
            f"{HELD_OUT}. Calibrate on {HELD_OUT} at least; 64 and more are better."
        )


@dataclass
class HeldOut:
    """The mean next-token cross-entropy, in nats, of a model cut at some widths, whatever the order of the recipe:
    a float32 copy of the canonical model is cut by the bases and moments of the dense one.

    ``cut(widths)`` are the changes of units, by member. ``path`` is a file that remembers every loss: a search with a
    seed asks the same again, so an interrupted one is replayed from there up to where it stopped.
    """

    model: PreTrainedModel
    layout: Layout
    units: Sequence[Unit]
    cut: Callable[[Mapping[Unit, int]], Mapping[str, Change]]
    tokens: Tokens
    batch: int
    progress: Progress
    path: Path | None = None
    losses: dict[str, float] = field(default_factory=dict)  # of all choices that were asked for
    measured: int = 0  # how many of them were computed, not remembered

    def __post_init__(self) -> None:
        self.remembered: dict[str, float | None] = {}
        if self.path is not None:
            self.remembered = read_kept_json(self.path) or {}

    def __call__(self, widths: Mapping[str, int]) -> float:
        """The loss at widths by space name; spaces left out stay whole. Infinite where it overflows."""
        kept = {u: widths.get(u.space.name, u.space.dim) for u in self.units}
        cut = {u: k for u, k in kept.items() if k < u.space.dim}
        choice = " ".join(f"{u.space.name}={k}" for u, k in cut.items())
        if choice not in self.losses:
            if choice in self.remembered:
                known = self.remembered[choice]
                self.losses[choice] = math.inf if known is None else known
            else:
                self.losses[choice] = self._measure(cut)
                self.measured += 1
                if self.path is not None:
                    self.remembered[choice] = self.losses[choice]
                    write_kept_json(self.path, self.remembered)
        return self.losses[choice]

    def _measure(self, cut: Mapping[Unit, int]) -> float:
        twin = copy_in(torch.float32, self.model)
        reparametrize(twin, self.layout, self.cut(cut))
        what = f"held-out loss of choice {len(self.losses) + 1}"
        loss = math.log(perplexity(twin, self.tokens, self.batch, self.progress, what))
        return loss if math.isfinite(loss) else math.inf
