"""The certificate of a derivation: all groups at once on inputs that were not traced, and a control for every space."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

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
from .turn import Plan, Step, turn

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
    """error: of all that was kept at once, the worst over probes; errors: by probe.

    proposed: the error of all that was derived, before anything was dropped. folding: of folded gains alone.
    controls: how far the outputs move when only one side of a space changes, the least over spaces is ``control``.
    refuted: what was dropped, and why. blocks, scales: what was kept.
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
        return max(self.errors.values(), default=float("inf"))

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
    folding, proposed = worst(trial.errors((), False)), worst(trial.errors(blocks, True))
    scales, controls = True, {}
    if not proposed <= TOLERANCE:
        error = worst(trial.errors((), True))
        if not error <= TOLERANCE:
            scales, refuted["scales"] = False, f"moves the outputs by {error:.1e}"
    kept: list[Block] = []
    for space, members in by_space(blocks).items():
        error = 0.0 if proposed <= TOLERANCE else worst(trial.errors(members, False))
        name = " ".join(map(str, space))
        if not error <= TOLERANCE:
            refuted[name] = f"moves the outputs by {error:.1e}"
            continue
        control = trial.control(members)
        if not control > CONTROL:
            refuted[name] = (
                f"a change of one side alone moves the outputs by {control:.1e} only: nothing is proven"
            )
            continue
        controls[name] = control
        kept += members
    if scales and derived.scales.free_scales + derived.scales.free_signs:
        controls["scales"] = trial.scale_control()
    return Certificate(
        errors=trial.errors(kept, scales),
        proposed=proposed,
        folding=folding,
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
                self.skipped.append(f"{probe.name}: the model's own outputs are not finite")

    def element(self, blocks: Iterable[Block], scales: bool) -> Element:
        return draw(self.derived, blocks, np.random.default_rng(self.seed), scales)

    def errors(self, blocks: Iterable[Block], scales: bool) -> dict[str, float]:
        element = self.element(blocks, scales)
        out = {}
        for probe, reference in zip(self.probes, self.references, strict=True):
            changed = louder(self.model, probe.loud)
            weights = weights_of(changed)
            fold(weights, self.derived)
            turn(weights, self.plan, element)
            out[probe.name] = distance(reference, outputs(changed, probe.example))
        return out

    def control(self, blocks: Sequence[Block]) -> float:
        """The error when a space is changed along one axis only, the first that shows anything on any probe."""
        element, chosen = self.element(blocks, False), set(blocks)
        sides = dict.fromkeys((s.axis, s.variance) for s in self.plan.steps if s.block in chosen)
        most = 0.0
        for n, (axis, variance) in enumerate(sides):
            for k in range(len(self.probes) if n < 2 else 1):
                most = max(most, self._half(element, axis, variance, k))
                if most > CONTROL:
                    return most
        return most

    def _half(self, element: Element, axis: Axis, variance: int, probe: int) -> float:
        """The error of a change of one axis, and of one variance where that carries both."""

        def keep(step: Step) -> bool:
            return step.axis == axis and step.variance == variance

        changed = louder(self.model, self.probes[probe].loud)
        weights = weights_of(changed)
        fold(weights, self.derived)
        turn(weights, self.plan, element, keep)
        return distance(self.references[probe], outputs(changed, self.probes[probe].example))

    def scale_control(self) -> float:
        """The error when writers are scaled and readers are not."""
        changed = copy.deepcopy(self.model)
        weights = weights_of(changed)
        fold(weights, self.derived)
        element = self.element((), True)
        turn(weights, self.plan, element, scale=lambda a: a not in self.derived.readers)
        return distance(self.references[0], outputs(changed, self.probes[0].example))


def louder(model: nn.Module, factor: float) -> nn.Module:
    """A copy, its matrices times a factor."""
    twin = copy.deepcopy(model)
    if factor != 1:
        for p in twin.parameters():
            if p.dim() > 1:
                p.data.mul_(factor)
    return twin
