"""The data flow of a run: plan, canonicalize, calibrate, fit, verify, select, slice."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float64
from torch import Tensor
from transformers import PreTrainedModel

from ..calibrate import walk
from ..calibrate.moments import Moments, check_finite
from ..calibrate.statistic import Statistic
from ..core.change import Basis, Change
from ..core.errors import CertificateError, InvarianceError
from ..core.operator import Operator
from ..core.progress import Progress, quiet
from ..core.shortcuts import Chain
from ..io.data import Tokens
from ..io.memo import Memo, digest
from ..method import checked
from ..model.canonical import join
from ..model.layout import Layout
from ..model.reparametrize import reparametrize
from ..model.verify import Certificate, certify
from . import predict
from .calibration import Calibration, timed
from .demand import Unit, Widths
from .heldout import HeldOut, split
from .plan import MEASURED, Plan
from .predict import UNTOLD, Foretold, foretell, narrowed, told_by

PROBE_TOKENS = 64


@dataclass
class Sliced:
    """What slicing gives: the changed model (float64, blocks restructured), its layout, and how it came about."""

    model: PreTrainedModel
    layout: Layout
    widths: Widths
    spectra: dict[str, Float64[Tensor, "c d"]]
    certificate: Certificate
    seconds: dict[str, float] = field(default_factory=dict)
    foretold: Foretold = UNTOLD
    energy: dict[str, float] = field(
        default_factory=dict
    )  # kind of space → which share of its energy is cut
    search: dict[str, float] | None = None  # what a selector that measures asked for
    encodes: dict[str, Float64[Tensor, "d k"]] = field(
        default_factory=dict
    )  # of the points of the stream that changed
    narrower: dict[float, Widths] = field(
        default_factory=dict
    )  # the nested members' by their shares
    members: dict[float, Foretold] = field(default_factory=dict)  # of those


def slice_model(
    model: PreTrainedModel,
    plan: Plan,
    tokens: Tokens | None,
    *,
    store: Path | None = None,
    progress: Progress = quiet,
    memo: Memo | None = None,
) -> Sliced:
    """Carry out a plan on a family's model, which is left as it is.

    ``store`` is a folder where moments of the dense model are kept and looked up, ``memo`` what earlier runs on the same
    model have computed. Raises CertificateError when the
    rotations alone move the logits (oneshot: before anything is cut; sequential orders find their rotations behind
    cuts, so there it is a copy of the dense model that is rotated, after the walk), InputError when the tokens are
    too few.
    """
    return _Run(model, plan, tokens, store, progress, memo or Memo()).run()


class _Run:
    """One run's state: the working model and what is known so far."""

    def __init__(
        self,
        model: PreTrainedModel,
        plan: Plan,
        tokens: Tokens | None,
        store: Path | None,
        progress: Progress,
        memo: Memo,
    ) -> None:
        self.original, self.plan, self.progress, self.memo = model, plan, progress, memo
        self.held: Tokens | None = None
        self.search: dict[str, float] | None = None
        if plan.measures:
            assert tokens is not None
            tokens, self.held = split(tokens, plan.recipe.where("calibrate"))
        self.tokens = tokens
        self.unit_of = {m: u for u in plan.units for m in u.members}
        self.bases: dict[str, Basis] = {}  # by a unit's first member
        self.changes: dict[str, Change] = {}
        self.gradients: predict.Gradients | None = None
        self.calibration = Calibration(model, plan, tokens, store, memo, progress)
        self.model, self.layout = self.calibration.model, self.calibration.layout
        self.seconds = self.calibration.seconds

    def run(self) -> Sliced:
        plan = self.plan
        self.calibration.measure_gradients()
        if plan.recipe.order == "oneshot":
            moments = self.calibration.measure(plan.of_dense())
            self._fit(plan.units, moments)
            chosen = self._allocate(moments, self._influence(moments))
            plan.check_widths(chosen)
            narrower = self._narrower(moments, chosen)
            certificate = self._certify()
            self._measure_gradients([chosen, *narrower.values()])
            members = {
                share: self._foretell(widths, partial(self._cut, plan.units, moments, widths))
                for share, widths in narrower.items()
            }
            with timed(self.seconds, "slice"):
                self.changes = self._cut(plan.units, moments, chosen)
                reparametrize(self.model, self.layout, self.changes)
        else:
            influence = self._influence(self.calibration.measure(plan.compared))
            widths: Widths | None = plan.allocate(None, influence=influence)
            ahead = [u for u in plan.units if widths is None or plan.stands(u)]
            moments = self.calibration.measure(plan.of_dense())
            self._fit(ahead, moments)
            chosen = self._allocate(moments, influence) if widths is None else widths
            plan.check_widths(chosen)
            self.bases = {n: b for n, b in self.bases.items() if plan.stands(self.unit_of[n])}
            self._measure_gradients([chosen])
            self._walk_sequentially(moments, chosen)
            certificate = self._certify()
            narrower, members = {}, {}
        join(self.model)
        spectra = {name: basis.energy for name, basis in self.bases.items()}
        stream = {n: c for n, c in self.changes.items() if self.layout.spaces[n].kind == "residual"}
        different = {id(c): c.encode.matrix()[0] for c in stream.values()}  # segments share theirs
        encodes = {n: different[id(c)] for n, c in stream.items()}
        return Sliced(
            self.model,
            self.layout,
            chosen,
            spectra,
            certificate,
            self.seconds,
            self._foretell(chosen, lambda: self.changes),
            self._energy(chosen),
            self.search,
            encodes,
            narrower,
            members,
        )

    def _fit(self, units: tuple[Unit, ...] | list[Unit], moments: Moments) -> None:
        with timed(self.seconds, "fit"):
            source = self._source()
            for unit in self.progress(units, "fit bases", len(units)):
                key = ("basis", *source, unit.members, unit.fitted, json.dumps(unit.rotate.spec()))
                self.bases[unit.space.name] = self.memo.once(
                    key, partial(self._basis, unit, moments), lambda basis: basis.nbytes
                )

    def _source(self) -> tuple[str, ...]:
        """What bases of the dense model are fitted to, beside a method and its options: weights, form, moments."""
        store = self.calibration.kept() if self.plan.reads_tokens else None
        form = f"{self.layout.folded} {self.plan.recipe.tie} {self.plan.layout.select(['edge'])}"
        return self.memo.weights(self.original), form, store.folder.name if store else ""

    def _basis(self, unit: Unit, moments: Moments) -> Basis:
        basis = checked.fitted(unit.rotate, unit.fitted, self.calibration.of(unit, moments))
        if unit.joint:
            each = torch.arange(basis.A.copies).split(unit.space.copies)
            first, *others = (basis.A.take(copies) for copies in each)
            if not all(first.same(other) for other in others):
                raise InvarianceError(
                    f"rotator '{unit.rotate.name}' says that it gives all layers one basis, and gave space "
                    f"'{unit.space.name}' another one than the rest. This is a fault of the method, not of the recipe."
                )
            return Basis(first, basis.energy.unflatten(0, (-1, unit.space.copies)).sum(0))
        return basis

    def _influence(self, moments: Moments) -> list[float] | None:
        """1 - E[cos(stream into, stream out of)] of every block, where a selector asks for it."""
        asked = self.plan.compared
        return (
            [1 - moments.known[p, Statistic.COSINE].mean.item() for p in asked] if asked else None
        )

    def _narrower(self, moments: Moments, widest: Widths) -> dict[float, Widths]:
        """The widths of the nested members, each within those of the next wider one."""
        found, within = dict[float, Widths](), widest
        for share, plan in self.plan.narrower().items():
            within = self._allocate(moments, self._influence(moments), plan, within)
            plan.check_attention(within)
            found[share] = within
        return found

    def _allocate(
        self,
        moments: Moments,
        influence: list[float] | None,
        plan: Plan | None = None,
        within: Widths | None = None,
    ) -> Widths:
        spectra = {name: basis.energy for name, basis in self.bases.items()}
        loss = None if self.held is None else self._held_out(self.held, moments)
        start = time.perf_counter()
        with timed(self.seconds, "select"):
            widths = (plan or self.plan).allocate(spectra, loss, influence, within)
        if loss is not None:
            counts = {"evaluations": len(loss.losses), "measured": loss.measured}
            spent, before = (
                {**counts, "seconds": round(time.perf_counter() - start, 3)},
                self.search or {},
            )
            self.search = {key: value + before.get(key, 0) for key, value in spent.items()}
        assert widths is not None
        return widths

    def _held_out(self, tokens: Tokens, moments: Moments) -> HeldOut:
        store, path = self.calibration.kept(), None
        calibrate = self.plan.recipe.calibrate
        assert calibrate is not None
        if store is not None:
            methods = [
                [
                    *u.members,
                    u.rotate.spec(),
                    u.slice and u.slice.spec(),
                    *([] if u.rank is None else [u.rank]),
                ]
                for u in self.plan.units
            ]
            identity = json.dumps([tokens.digest(), self.plan.recipe.tie, methods])
            path = (
                store.folder / f"losses.{hashlib.sha256(identity.encode()).hexdigest()[:32]}.json"
            )

        def cut(widths: Mapping[Unit, int]) -> dict[str, Change]:
            return self._cut(widths, moments, {u.space.name: k for u, k in widths.items()})

        return HeldOut(
            self.model,
            self.layout,
            self.plan.units,
            cut,
            tokens,
            calibrate.batch,
            self.progress,
            path,
        )

    def _measure_gradients(self, choices: Sequence[Widths]) -> None:
        """Measure the gradients of the model, which is not cut yet, where they are to tell what widths lose."""
        units = self.plan.units
        if self.tokens is None or not any(
            told_by(units, widths) == "gradients" for widths in choices
        ):
            return
        assert self.plan.recipe.calibrate is not None
        changing = [
            u for u in units if u.slice is not None or any(u in narrowed(units, w) for w in choices)
        ]
        spaces = [m for u in changing for m in u.members]
        skip = self.plan.recipe.calibrate.skip
        key = ("gradients", *self._source(), self.tokens.digest(), skip, *spaces)
        with timed(self.seconds, "predict"):
            make = partial(
                predict.measure,
                self.model,
                self.layout,
                spaces,
                self.tokens,
                self.progress,
                skip=skip,
            )
            self.gradients = self.memo.once(key, make, lambda found: found.nbytes)

    def _foretell(self, widths: Widths, changes: Callable[[], Mapping[str, Change]]) -> Foretold:
        with timed(self.seconds, "predict"):
            return foretell(self.plan.units, widths, self.bases, self.gradients, changes)

    def _energy(self, widths: Widths) -> dict[str, float]:
        """The share of energy that widths cut, by kind of space and on average over its bases; 0 is left out, and so are
        bases that tell no direction from another."""
        found: dict[str, list[float]] = {}
        for unit in self.plan.units:
            energy = self.bases[unit.space.name].energy
            if not bool((energy != energy[:, :1]).any()):
                continue
            lost = energy[:, widths[unit.space.name] :].sum() / energy.sum().clamp_min(1e-300)
            found.setdefault(unit.space.kind, []).append(lost.item())
        means = {kind: sum(each) / len(each) for kind, each in found.items()}
        return {kind: mean for kind, mean in means.items() if mean}

    def _cut(self, units: Iterable[Unit], moments: Moments, widths: Widths) -> dict[str, Change]:
        """The changes of all members of units, which stand in the order of the stream."""
        chain = Chain(self.plan.ranks)
        return {
            m: c
            for u in units
            for c in (self._change(u, moments, widths, chain),)
            for m in u.members
        }

    def _change(self, unit: Unit, moments: Moments, widths: Widths, chain: Chain) -> Change:
        """The change of a unit, which ``chain`` turns where a shortcut of low rank leads to it."""
        change = self._cut_alone(unit, moments, widths)
        if unit.rank is None:
            return change
        return chain.add(
            unit.space.name,
            change,
            self.calibration.of(unit, moments).second(unit.space, "seen")[0],
        )

    def _cut_alone(self, unit: Unit, moments: Moments, widths: Widths) -> Change:
        basis = self.bases[unit.space.name]
        k = widths[unit.space.name]
        if not k:
            return Change.empty(unit.space, 0)
        if unit.slice is None or k == unit.space.dim:
            return Change.rotation(basis.A)  # what was certified
        return checked.cut(unit.slice, unit.space, basis, k, self.calibration.of(unit, moments))

    def _walk_sequentially(self, ahead: Moments, widths: Widths) -> None:
        decided: dict[str, Change] = {}
        chain = Chain(self.plan.ranks)

        def decide(name: str, moments: Moments) -> Change:
            unit = self.unit_of[name]
            first = unit.space.name
            if first not in decided:
                with timed(self.seconds, "fit"):
                    if first not in self.bases:
                        check_finite(moments)
                        self.bases[first] = self._basis(unit, moments)
                    seen = ahead if self.plan.stands(unit) else moments
                    decided[first] = self._change(unit, seen, widths, chain)
            return decided[first]

        wanted = {
            m: frozenset() if self.plan.stands(u) else u.needs & MEASURED
            for m, u in self.unit_of.items()
        }
        batches: list[walk.Batch] = []
        start = time.perf_counter()
        before = self.seconds.get("fit", 0.0)
        dtype = torch.float32
        if self.plan.reads_tokens:
            batches, dtype = self.calibration.batches()
        walk.sequential(
            self.model,
            self.layout,
            batches,
            wanted,
            dtype,
            decide,
            follow=self.plan.follows,
            readers=self.plan.recipe.refit == "both",
            stay=self.layout.stages(widths),
            streams=self.calibration.streams,
            joined=self.plan.ranks,
            progress=self.progress,
        )
        spent = time.perf_counter() - start - (self.seconds.get("fit", 0.0) - before)
        self.seconds["calibrate"] = self.seconds.get("calibrate", 0.0) + spent
        self.changes = {
            m: decided[u.space.name] for m, u in self.unit_of.items() if u.space.name in decided
        }

    def _certify(self) -> Certificate:
        """The certificate of all bases at once, on probe tokens that need no text."""
        bases: Mapping[str, Operator] = {
            m: self.bases[u.space.name].A for m, u in self.unit_of.items()
        }
        g = torch.Generator().manual_seed(self.plan.recipe.seed)
        ids = torch.randint(0, self.original.config.vocab_size, (2, PROBE_TOKENS // 2), generator=g)
        if self.tokens is not None:
            ids = self.tokens.ids[:1, :PROBE_TOKENS]
        with timed(self.seconds, "verify"):
            asked = json.dumps(
                [[*bases], self.plan.fold, self.plan.recipe.tie, self.plan.recipe.seed]
            )
            different = {id(A): A for A in bases.values()}  # segments share theirs
            places = {at: n for n, at in enumerate(different)}
            which = [places[id(A)] for A in bases.values()]
            rotation = digest(
                f"{self.memo.weights(self.original)} {asked} {which}",
                (ids, *(t for A in different.values() for t in A.tensors)),
            )
            certificate = self.memo.once(
                ("certificate", rotation),
                lambda: certify(
                    self.original,
                    bases,
                    ids,
                    fold=self.plan.fold,
                    tie=self.plan.recipe.tie,
                    seed=self.plan.recipe.seed,
                ),
            )
        if not certificate.passed:
            raise CertificateError(f"{certificate.failure}. Nothing is written.")
        return certificate
