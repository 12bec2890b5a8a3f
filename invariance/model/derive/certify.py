"""The certificate of a derivation: all groups at once on inputs that were not traced, and a control for every space."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import eq

import numpy as np
import torch
from torch import Tensor, nn

from .analysis import Derived
from .block import Axis, Block, Kind
from .elements import Element, draw
from .fold import fold
from .precision import Double, double
from .record import weights_of
from .trace import Example, forward
from .turn import Plan, Step, scale_factors, turn

TOLERANCE = 1e-10  # float64 throughout: rounding stays below 1e-12 in models of a few layers
CONTROL = 1e-6  # a control that moves the outputs by less proves nothing

Space = tuple[str, Kind]


@dataclass(frozen=True, eq=False)
class Probe:
    """An input that was not traced. loud: all matrices times this, so that clipping and caps are reached."""

    name: str
    example: Example
    loud: float = 1.0


@dataclass(frozen=True, eq=False)
class Certificate:
    """What holds of a derivation.

    errors: of all that was kept at once, by probe; ``error`` is the worst. proposed: of all that was derived, before
    anything was dropped. folding: of folded gains alone. controls: how far the outputs move when only one axis of a space
    changes; ``control`` is the least. refuted: what was dropped, and why. blocks, scales: what was kept.
    skipped: probes on which the model's own outputs are not finite.
    """

    errors: Mapping[str, float]
    proposed: float
    folding: float
    controls: Mapping[str, float]
    refuted: Mapping[str, str]
    blocks: tuple[Block, ...]
    scales: bool
    unseen: tuple[str, ...]
    skipped: tuple[str, ...]

    @property
    def error(self) -> float:
        return worst(self.errors)

    @property
    def control(self) -> float:
        return min(self.controls.values(), default=0.0)

    @property
    def passed(self) -> bool:
        return bool(self.blocks) and self.error <= TOLERANCE and self.control > CONTROL


def certify(
    model: nn.Module, derived: Derived, probes: Sequence[Probe], seed: int = 0
) -> Certificate:
    """A model in float64; it is not changed. What is refuted is dropped and named; the rest is tried again at once."""
    trial = Trial(model, derived, probes, seed)
    blocks = tuple(b for b in derived.blocks if b not in trial.plan.broken)
    refuted = {name_of(b): why for b, why in trial.plan.broken.items()}
    errors = trial.errors(blocks, True)
    held = worst(errors) <= TOLERANCE
    kept, scales, controls = trial.sift(blocks, held, refuted)
    return Certificate(
        errors=errors
        if held and len(kept) == len(blocks) and scales
        else trial.errors(kept, scales),
        proposed=worst(errors),
        folding=trial.error(trial.changed(trial.element((), False)), 0),
        controls=controls,
        refuted=refuted,
        blocks=tuple(kept),
        scales=scales,
        unseen=derived.unseen,
        skipped=tuple(trial.skipped),
    )


def by_space(blocks: Iterable[Block]) -> dict[Space, list[Block]]:
    out: dict[Space, list[Block]] = {}
    for b in blocks:
        out.setdefault((b.name, b.kind), []).append(b)
    return out


def name_of(b: Block) -> str:
    return f"{b.name} {b.kind}"


def worst(errors: Mapping[str, float]) -> float:
    return max(errors.values(), default=float("inf"))


def outputs(model: nn.Module, example: Example) -> Tensor:
    """The model's results as one vector, every norm and softmax in float64."""
    with double(), Double():
        return torch.cat([t.double().flatten() for t in forward(model, example)])


def distance(reference: Tensor, other: Tensor) -> float:
    """‖other - reference‖ / ‖reference‖; infinite where a number is not finite."""
    error = float((other - reference).norm() / reference.norm())
    return error if np.isfinite(error) else float("inf")


class Trial:
    """Changed copies of one model, compared with it on probes."""

    def __init__(
        self, model: nn.Module, derived: Derived, probes: Sequence[Probe], seed: int
    ) -> None:
        self.model, self.derived, self.seed = model, derived, seed
        self.plan = Plan.of(derived)
        self.probes: list[Probe] = []
        self.references: list[Tensor] = []
        self.skipped: list[str] = []
        for probe in probes:
            reference = outputs(louder(model, probe.loud), probe.example)
            if bool(torch.isfinite(reference).all()) and float(reference.norm()) > 0:
                self.probes.append(probe)
                self.references.append(reference)
            else:
                self.skipped.append(probe.name)

    def element(self, blocks: Iterable[Block], scales: bool) -> Element:
        return draw(self.derived, blocks, np.random.default_rng(self.seed), scales)

    def changed(
        self,
        element: Element,
        keep: Callable[[Step], bool] = lambda step: True,
        scaled: Callable[[Axis], bool] = lambda axis: True,
    ) -> nn.Module:
        """A copy with gains folded and an element applied."""
        twin = copy.deepcopy(self.model)
        weights = weights_of(twin)
        fold(weights, self.derived)
        turn(weights, self.plan, element, keep, scaled)
        return twin

    def error(self, changed: nn.Module, probe: int) -> float:
        loud = louder(changed, self.probes[probe].loud)
        return distance(self.references[probe], outputs(loud, self.probes[probe].example))

    def errors(self, blocks: Iterable[Block], scales: bool) -> dict[str, float]:
        changed = self.changed(self.element(blocks, scales))
        return {p.name: self.error(changed, k) for k, p in enumerate(self.probes)}

    def sift(
        self, blocks: Sequence[Block], held: bool, refuted: dict[str, str]
    ) -> tuple[list[Block], bool, dict[str, float]]:
        """Blocks that hold and whose control fails, whether scales do, and the controls. held: all do at once."""
        kept: list[Block] = []
        controls: dict[str, float] = {}
        for space, members in by_space(blocks).items():
            name = " ".join(space)
            if not held and not (error := worst(self.errors(members, False))) <= TOLERANCE:
                refuted[name] = f"moves the outputs by {error:.1e}"
            elif not (control := self.control(members)) > CONTROL:
                refuted[name] = (
                    f"a change of one side moves the outputs by {control:.0e}: nothing is proven"
                )
            else:
                controls[name] = control
                kept += members
        scales = held or (error := worst(self.errors((), True))) <= TOLERANCE
        if not scales:
            refuted["scales"] = f"move the outputs by {error:.1e}"
        elif self.derived.scales.free_scales + self.derived.scales.free_signs:
            controls["scales"] = self.scale_control()
        return kept, scales, controls

    def control(self, blocks: Sequence[Block]) -> float:
        """The error when a space is changed along one axis only, the first that shows anything on any probe."""
        element, chosen = self.element(blocks, False), set(blocks)
        sides = dict.fromkeys((s.axis, s.variance) for s in self.plan.steps if s.block in chosen)
        most = 0.0
        for n, side in enumerate(sides):
            changed = self.changed(element, partial(on_side, side))
            for probe in range(len(self.probes) if n < 2 else 1):
                most = max(most, self.error(changed, probe))
                if most > CONTROL:
                    return most
        return most

    def scale_control(self) -> float:
        """The error when scales are applied along one axis only, the first that shows anything."""
        element = self.element((), True)
        most = 0.0
        for axis in scale_factors(self.derived, element):
            most = max(most, self.error(self.changed(element, scaled=partial(eq, axis)), 0))
            if most > CONTROL:
                break
        return most


def on_side(side: tuple[Axis, int], step: Step) -> bool:
    """Whether a step changes one axis, and one variance where that carries both."""
    return (step.axis, step.variance) == side


def louder(model: nn.Module, factor: float) -> nn.Module:
    """A copy, its matrices times a factor; every change is linear in them, so they may be made louder after it."""
    if factor == 1:
        return model
    twin = copy.deepcopy(model)
    for p in twin.parameters():
        if sum(n > 1 for n in p.shape) > 1:
            p.data.mul_(factor)
    return twin
