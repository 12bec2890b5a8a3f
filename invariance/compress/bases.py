"""The bases of a run: fitted unit by unit, kept small, and cut."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..calibrate.moments import Moments
from ..core.change import Basis, Change
from ..core.dense import Dense
from ..core.errors import InvarianceError
from ..core.operator import Operator
from ..core.pick import Pick
from ..core.shortcuts import Chain
from ..core.spill import Spill
from ..method import checked
from ..method.interfaces import Joint, Rotator
from ..method.joint import Scene
from .calibration import Calibration
from .demand import Unit, Widths
from .plan import Plan


class Bases(Mapping[str, Operator]):
    """The basis of each unit by its first member, fitted to the dense model's moments or behind cuts.

    Those that pick and scale directions are kept as such; others go to disk beyond a share of memory.
    """

    def __init__(self, plan: Plan, calibration: Calibration) -> None:
        self.plan, self.calibration, self.memo = plan, calibration, calibration.memo
        self.picks: dict[str, Pick] = {}
        self.kept = Spill()
        self.spectra: dict[str, Tensor] = {}
        self.given: dict[str, Change] = {}  # by joint methods that give no basis to cut
        self.unit_of = {m: u for u in plan.units for m in u.members}

    # --- As a mapping, the matrices A.

    def __getitem__(self, name: str) -> Operator:
        if name in self.picks:
            return self.picks[name]
        return Dense(self.kept[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.spectra)

    def __len__(self) -> int:
        return len(self.spectra)

    @property
    def shared(self) -> dict[str, str]:
        """Every space whose unit has a basis → the unit's first member."""
        return {m: u.space.name for m, u in self.unit_of.items() if u.space.name in self.spectra}

    @property
    def fitted(self) -> Fitted:
        """The basis of every space that has one."""
        return Fitted(self.picks, self.kept, self.spectra, self.shared)

    def keep_only(self, units: Iterable[Unit]) -> None:
        """Forget the bases of all others."""
        names = {u.space.name for u in units}
        for name in [n for n in self.spectra if n not in names]:
            del self.spectra[name]
            self.picks.pop(name, None)
            self.kept.pop(name, None)

    def basis(self, unit: Unit) -> Basis:
        return Basis(self[unit.space.name], self.spectra[unit.space.name])

    # --- Fitting.

    def fit_dense(self, unit: Unit, moments: Moments) -> None:
        """Fit a unit to the dense model, or remember what an earlier run on it has fitted."""
        key = ("basis", *self.source(), unit.members, unit.fitted, json.dumps(unit.rotate.spec()))
        made = partial(self._fitted, unit, moments)
        self._keep(unit.space.name, self.memo.once(key, made, lambda basis: basis.nbytes))

    def fit(self, unit: Unit, moments: Moments) -> None:
        """Fit a unit to the model as it stands now."""
        self._keep(unit.space.name, self._fitted(unit, moments))

    def source(self) -> tuple[str, ...]:
        """What bases of the dense model are fitted to, beside a method and its options: weights, form, moments."""
        store = self.calibration.kept() if self.plan.reads_tokens else None
        form = f"{self.calibration.layout.folded} {self.plan.recipe.tie} {self.plan.layout.select(['edge'])}"
        return self.memo.weights(self.calibration.source), form, store.folder.name if store else ""

    def _keep(self, name: str, basis: Basis) -> None:
        self.spectra[name] = basis.energy
        if isinstance(basis.A, Pick):
            self.picks[name] = basis.A
        else:
            self.kept[name] = basis.A.matrix()

    def _fitted(self, unit: Unit, moments: Moments) -> Basis:
        return fit(unit, self.calibration.of(unit, moments))

    def fit_joint(self, units: Sequence[Unit], widths: Widths | None) -> None:
        """Fit the units of one joint method together, or remember what an earlier run has fitted."""
        (joint,) = {unit.rotate for unit in units}
        assert isinstance(joint, Joint) and self.calibration.tokens is not None
        spec, tokens = json.dumps(joint.spec()), self.calibration.tokens.digest()
        kept = None if widths is None else tuple(widths[u.space.name] for u in units)
        members = tuple(u.members for u in units)
        key = ("joint", *self.source(), tokens, members, kept, spec)
        made = partial(self._scene, units, widths)
        found = self.memo.once(
            key, lambda: checked.jointly(joint, made()), lambda given: _nbytes(given.values())
        )
        for name, one in found.items():
            if isinstance(one, Change):
                self.given[name] = one
                space = self.unit_of[name].space
                same = Pick.first(space.copies, space.dim)
                one = Basis(same, torch.ones(space.copies, space.dim, dtype=torch.float64))
            self._keep(name, one)

    def _scene(self, units: Sequence[Unit], widths: Widths | None) -> Scene:
        calibration = self.calibration
        assert calibration.tokens is not None
        moments = Moments(layout=calibration.layout)
        for unit in units:
            known = calibration.known(unit, unit.needs)
            moments = moments.merge(calibration.of(unit, known))
        return Scene(
            calibration.parts.whole(torch.float32).requires_grad_(False),
            calibration.layout,
            {u.space.name: u.fitted for u in units},
            {u.space.name: u.members for u in units},
            widths,
            calibration.tokens,
            moments,
        )

    # --- Cutting.

    def change(self, unit: Unit, moments: Moments, widths: Widths, chain: Chain) -> Change:
        """The change of a unit, which ``chain`` turns where a shortcut of low rank leads to it."""
        change = self._cut_alone(unit, moments, widths)
        if unit.rank is None:
            return change
        seen = self.calibration.of(unit, moments).second(unit.space, "seen")[0]
        return chain.add(unit.space.name, change, seen)

    def _cut_alone(self, unit: Unit, moments: Moments, widths: Widths) -> Change:
        k = widths[unit.space.name]
        if not k:
            return Change.empty(unit.space, 0)
        if unit.space.name in self.given:
            return self.given[unit.space.name]
        basis = self.basis(unit)
        if unit.slice is None or k == unit.space.dim:
            return Change.rotation(basis.A)  # what was certified
        known = self.calibration.of(unit, moments)
        return checked.cut(unit.slice, unit.space, basis, k, known)

    def energy_lost(self, widths: Widths) -> dict[str, float]:
        """The share of energy that widths cut, by kind of space and on average over its bases; 0 is left out, and so are
        bases that tell no direction from another."""
        found: dict[str, list[float]] = {}
        for unit in self.plan.units:
            energy = self.spectra[unit.space.name]
            if not bool((energy != energy[:, :1]).any()):
                continue
            lost = energy[:, widths[unit.space.name] :].sum() / energy.sum().clamp_min(1e-300)
            found.setdefault(unit.space.kind, []).append(lost.item())
        means = {kind: sum(each) / len(each) for kind, each in found.items()}
        return {kind: mean for kind, mean in means.items() if mean}


def _nbytes(given: Iterable[Basis | Change]) -> int:
    each = ((one.A,) if isinstance(one, Basis) else (one.encode, one.decode) for one in given)
    return sum(operator.nbytes for operators in each for operator in operators)


@dataclass(frozen=True)
class Fitted(Mapping[str, Basis]):
    """Bases by the names of their spaces, each read from where it is kept when it is asked for."""

    picks: Mapping[str, Pick]
    kept: Spill
    spectra: Mapping[str, Tensor]
    shared: Mapping[str, str]  # space → the first that has its basis

    def __getitem__(self, name: str) -> Basis:
        first = self.shared[name]
        A = self.picks[first] if first in self.picks else Dense(self.kept[first])
        return Basis(A, self.spectra[first])

    def __iter__(self) -> Iterator[str]:
        return iter(self.shared)

    def __len__(self) -> int:
        return len(self.shared)


def fit(unit: Unit, moments: Moments) -> Basis:
    """What its rotator gives a unit, checked; ``moments`` are of all members together. Raises InvarianceError."""
    assert isinstance(unit.rotate, Rotator)  # a joint method fits several units
    basis = checked.fitted(unit.rotate, unit.fitted, moments)
    if not unit.side_by_side:
        return basis
    each = torch.arange(basis.A.copies).split(unit.space.copies)
    first, *others = (basis.A.take(copies) for copies in each)
    if not all(first.same(other) for other in others):
        raise InvarianceError(
            f"rotator '{unit.rotate.name}' says that it gives all layers one basis, and gave space "
            f"'{unit.space.name}' another one than the rest. This is a fault of the method, not of the recipe."
        )
    return Basis(first, basis.energy.unflatten(0, (-1, unit.space.copies)).sum(0))


class Cuts:
    """The changes of all units at some widths, made in the order of the stream and each once.

    What several spaces share is kept until the last of them is asked for, as is a point of the stream.
    """

    def __init__(self, bases: Bases, widths: Widths) -> None:
        self.bases, self.widths = bases, widths
        self.chain = Chain(bases.plan.ranks)
        self.made: dict[str, Change] = {}

    def of(self, names: Iterable[str], known: Moments | None = None) -> dict[str, Change]:
        """The changes of some spaces, those left out that keep theirs; ``known`` has moments of units just measured."""
        found = {}
        for name in names:
            unit = self.bases.unit_of.get(name)
            if unit is None:
                continue
            first = unit.space.name
            if first not in self.made:
                calibration = self.bases.calibration
                moments = calibration.known(unit, unit.cut_needs) if known is None else known
                self.made[first] = self.bases.change(unit, moments, self.widths, self.chain)
            found[name] = self.made[first]
        return found

    def forget(self, names: Iterable[str]) -> None:
        """Let go what belongs to some spaces alone."""
        for name in names:
            if len(self.bases.unit_of[name].members) == 1:
                self.made.pop(name, None)
