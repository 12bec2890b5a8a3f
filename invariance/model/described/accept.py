"""A description accepted by its certificate alone: what moves the logits is dropped and named."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn

from ..derive.certify import CONTROL, TOLERANCE, distance, outputs
from ..derive.record import weights_of
from ..derive.trace import Example
from .check import check, untied
from .description import Axis, Description, Flat, Part, Space
from .elements import Element, elements
from .pattern import RIGID, Pattern, Run, Symbol, compress, expand
from .turn import Side, Turner, sides


@dataclass(frozen=True)
class Accepted:
    """What was kept, its error with all spaces at once, and why the rest was dropped.

    ``controls``: how far the logits move when one side of a space stays as it was, by the space's full name. A space
    without a control above CONTROL is not proven: nothing on these inputs depends on it.
    """

    description: Description
    error: float
    controls: Mapping[str, float] = field(repr=False)
    refuted: Mapping[str, str]

    @property
    def unproven(self) -> list[str]:
        return [name for name, moved in self.controls.items() if not moved > CONTROL]


class Trial:
    """One model, its weights changed and put back."""

    def __init__(self, model: nn.Module, description: Description, examples: Sequence[Example]):
        untied(model, description)
        self.model, self.examples = model, examples
        self.named = weights_of(model)
        self.kept = {n: p.detach().clone() for n, p in self.named.items()}
        self.references = [outputs(model, e) for e in examples]

    def error(
        self, flat: Flat, chosen: Mapping[str, Element], without: Side | None = None
    ) -> float:
        """The largest distance of the logits over all examples; of a control, on the first."""
        gains = {n: self.kept[n] for n in flat.gains}
        turner = Turner(flat, chosen, gains, without)
        try:
            with torch.no_grad():
                for name, p in self.named.items():
                    p.copy_(turner(name, p))
            shown = None if without is None else 1
            pairs = islice(zip(self.references, self.examples, strict=True), shown)
            return max(distance(r, outputs(self.model, e)) for r, e in pairs)
        finally:
            with torch.no_grad():
                for name, p in self.named.items():
                    p.copy_(self.kept[name])


def accept(
    model: nn.Module, description: Description, examples: Sequence[Example], seed: int = 0
) -> Accepted:
    """Tries a description on a model in float64 and inputs that were not traced; the model is as it was afterwards."""
    check(description, model)
    trial = Trial(model, description, examples)
    refuted = dict[str, str]()
    error = trial.error(description.flat(), elements(description, seed))
    if not error <= TOLERANCE:
        description, refuted = _sifted(trial, description, seed)
        error = trial.error(description.flat(), elements(description, seed))
    controls = {
        name: _control(trial, description, name, seed) for name in description.flat().spaces
    }
    return Accepted(description, error, controls, refuted)


def _control(trial: Trial, description: Description, space: str, seed: int) -> float:
    """The error when one side of a space stays: the first that shows anything."""
    chosen, most = elements(description, seed, [space]), 0.0
    for side in reversed(sides(description, space)):
        most = max(most, trial.error(description.flat(), chosen, side))
        if most > CONTROL:
            break
    return most


def _sifted(
    trial: Trial, description: Description, seed: int
) -> tuple[Description, dict[str, str]]:
    """Spaces one by one, each in all layers of its part at once; of a refuted one its scales go first."""
    flat, refuted = description.flat(), dict[str, str]()
    gone, bare = set[tuple[int, str]](), set[tuple[int, str]]()
    for n, part in enumerate(description.parts):
        for space in part.spaces:
            names = [full for full, s in flat.spaces.items() if s is space]
            chosen = elements(description, seed, names)
            error = trial.error(flat, chosen)
            if error <= TOLERANCE:
                continue
            still = {k: replace(e, scales=_ones(e.scales)) for k, e in chosen.items()}
            scales_only = bool(space.scales) and trial.error(flat, still) <= TOLERANCE
            (bare if scales_only and chosen[names[0]].permutation is not None else gone).add(
                (n, space.name)
            )
            what = "scales of " if (n, space.name) in bare else ""
            refuted[what + names[0]] = f"moves the logits by {error:.1e}"
    return without(description, gone, bare), refuted


def _ones(scales: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(torch.ones_like(s) for s in scales)


def without(
    description: Description, gone: Iterable[tuple[int, str]], bare: Iterable[tuple[int, str]] = ()
) -> Description:
    """A description without spaces (the number of their part, their name), or without the scales of some."""
    gone, bare = set(gone), set(bare)
    everywhere = {name for n, name in gone if n == 0}, {name for n, name in bare if n == 0}
    parts = []
    for n, part in enumerate(description.parts):
        lost = {name for m, name in gone if m == n} | everywhere[0]
        still = {name for m, name in bare if m == n} | everywhere[1]
        parts.append(_part(part, lost, still))
    return Description(description.what, parts[0], tuple(parts[1:]))


def _part(part: Part, lost: set[str], still: set[str]) -> Part:
    def spaces(found: tuple[Space, ...]) -> tuple[Space, ...]:
        return tuple(
            replace(s, scales="") if s.name in still else s for s in found if s.name not in lost
        )

    axes = tuple(_axis(a, lost, still) for a in part.axes)
    return replace(part, spaces=spaces(part.spaces), axes=axes)


def _axis(a: Axis, lost: set[str], still: set[str]) -> Axis:
    labels = [_label(label, lost, still) for label in a.labels]
    rigid: Pattern = (Run(RIGID, 0),)
    more = tuple(label for label in labels[1:] if label != rigid)
    return replace(a, labels=(labels[0], *more))


def _label(label: Pattern, lost: set[str], still: set[str]) -> Pattern:
    told = [s for s, _ in expand(label)]
    if not any(s.space in lost | still for s in told):
        return label
    symbols: dict[Symbol, int] = {RIGID: 0}
    which, codes = list[np.ndarray](), list[np.ndarray]()
    for symbol, found in expand(label):
        new = (
            RIGID
            if symbol.space in lost
            else Symbol(symbol.space)
            if symbol.space in still
            else symbol
        )
        which.append(np.full(len(found), symbols.setdefault(new, len(symbols))))
        codes.append(np.zeros_like(found) if new == RIGID else found)
    if not np.concatenate(which).any():
        return (Run(RIGID, 0),)
    return compress(list(symbols), np.concatenate(which), np.concatenate(codes))
