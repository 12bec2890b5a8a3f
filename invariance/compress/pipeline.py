"""The data flow of a run: plan, canonicalize, calibrate, fit, verify, select, slice."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Protocol

import torch
from jaxtyping import Float32, Float64, Int64
from torch import Tensor
from transformers import PreTrainedModel

from ..calibrate import walk
from ..calibrate.batch import Batch
from ..calibrate.certificate import Rotations, certify, spaces_of
from ..calibrate.moments import Moments, check_finite
from ..calibrate.statistic import Statistic
from ..core.change import Basis, Change
from ..core.errors import CertificateError
from ..core.progress import Progress, quiet
from ..core.spill import Shared
from ..io.data import Tokens
from ..io.memo import Memo, digest
from ..io.source import live
from ..method.interfaces import Rotator
from ..model.canonical import join
from ..model.layout import Edge, Layout
from ..model.source import Source
from ..model.verify import Certificate
from ..model.working import Working
from . import predict
from .bases import Bases, Cuts
from .calibration import Calibration, timed
from .demand import Unit, Widths
from .heldout import HeldOut, split
from .plan import MEASURED, Plan
from .predict import UNTOLD, Foretold, foretell, narrowed, told_by

PROBE_TOKENS = 64


def probe(vocabulary: int, seed: int, tokens: Tokens | None) -> Int64[Tensor, "B T"]:
    """The token ids that a certificate compares logits on: the first that there are, else random ones."""
    if tokens is not None:
        return tokens.ids[:1, :PROBE_TOKENS]
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary, (2, PROBE_TOKENS // 2), generator=g)


class Receiver(Protocol):
    """Takes the parts of a cut model as they come about; they are not kept."""

    def begin(self, parts: Working, widths: Widths) -> None: ...
    def stage(self, parts: Working, edge: Edge) -> None: ...
    def end(self, parts: Working) -> None: ...


@dataclass
class Sliced:
    """What slicing gives: the changed model (float64, blocks restructured), its layout, and how it came about.

    Where a receiver has taken its parts, the model is on meta.
    """

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
    encodes: Mapping[str, Float32[Tensor, "d k"]] = field(
        default_factory=dict
    )  # of the points of the stream that changed
    narrower: dict[float, Widths] = field(
        default_factory=dict
    )  # the nested members' by their shares
    members: dict[float, Foretold] = field(default_factory=dict)  # of those
    bases: Mapping[str, Basis] = field(default_factory=dict)  # of every space that a step names


@dataclass(frozen=True)
class Means:
    """What a run works with beside model and plan: where moments are kept, what earlier runs computed, who listens."""

    store: Path | None = None
    memo: Memo = field(default_factory=Memo)
    progress: Progress = quiet
    receiver: Receiver | None = None
    device: str | torch.device = "cpu"


def slice_model(
    model: PreTrainedModel | Source,
    plan: Plan,
    tokens: Tokens | None,
    *,
    store: Path | None = None,
    progress: Progress = quiet,
    memo: Memo | None = None,
    receiver: Receiver | None = None,
    device: str | torch.device | None = None,
) -> Sliced:
    """Carry out a plan on a family's model, which is left as it is.

    ``store`` is a folder where moments of the dense model are kept and looked up, ``memo`` what earlier runs on the same
    model have computed. ``receiver`` gets the cut model part by part, and none of it stays in memory; without one, all
    of it does. Raises CertificateError when the rotations alone move the logits, InputError when the tokens are too few.
    """
    source = live(model) if isinstance(model, PreTrainedModel) else model
    if isinstance(model, PreTrainedModel):
        device = device or model.device
    means = Means(store, memo or Memo(), progress, receiver, device or "cpu")
    return _Run(source, plan, tokens, means).run()


class _Run:
    """One run's state: the working model and what is known so far."""

    def __init__(self, source: Source, plan: Plan, tokens: Tokens | None, means: Means) -> None:
        self.source, self.plan, self.means = source, plan, means
        self.progress, self.memo = means.progress, means.memo
        self.held: Tokens | None = None
        self.search: dict[str, float] | None = None
        if plan.measures:
            assert tokens is not None
            tokens, self.held = split(tokens, plan.recipe.where("calibrate"))
        self.tokens = tokens
        self.encodes = Shared()
        self.gradients: predict.Gradients | None = None
        self.calibration = Calibration(
            source, plan, tokens, means.store, means.memo, means.progress, device=means.device
        )
        self.parts, self.layout = self.calibration.parts, self.calibration.layout
        self.bases = Bases(plan, self.calibration)
        self.seconds = self.calibration.seconds

    def run(self) -> Sliced:
        self.calibration.measure_gradients()
        oneshot = self.plan.recipe.order == "oneshot"
        chosen, narrower, members = self._oneshot() if oneshot else self._sequential()
        certificate = self._certify()
        if self.means.receiver is None:
            self.parts.settle()
        else:
            self.means.receiver.end(self.parts)
        return Sliced(
            self.parts.model,
            self.layout,
            chosen,
            dict(self.bases.spectra),
            certificate,
            self.seconds,
            self._foretell(chosen, self.lost),
            self.bases.energy_lost(chosen),
            self.search,
            self.encodes,
            narrower,
            members,
            self.bases.fitted,
        )

    # --- Oneshot: everything is measured and fitted on the dense model.

    def _oneshot(self) -> tuple[Widths, dict[float, Widths], dict[float, Foretold]]:
        plan = self.plan
        if (known := self._known_ahead()) is not None:
            self._begin([known], known)
            self._measure_and_cut(known)
            return known, {}, {}
        self.calibration.measure(plan.of_dense())
        self._fit([u for u in plan.units if isinstance(u.rotate, Rotator)])
        self._fit_joint()
        influence = self._influence()
        chosen = self._allocate(influence)
        plan.check_widths(chosen)
        narrower = self._narrower(influence, chosen)
        self._begin([chosen, *narrower.values()], chosen)
        members = {share: self._foretell_member(widths) for share, widths in narrower.items()}
        cuts = Cuts(self.bases, chosen)
        with timed(self.seconds, "slice"):
            for edge in self.progress(self.layout.edges, "slice", self.layout.depth):
                self._cut_stage(edge, cuts)
        return chosen, narrower, members

    def _known_ahead(self) -> Widths | None:
        """The widths where every stage can be cut as soon as it is measured; None where something must be seen before."""
        inner = all(len(u.members) == 1 and u.space.kind != "residual" for u in self.plan.units)
        if (
            not inner
            or self.plan.joined
            or self.plan.compared
            or self.plan.recipe.nested
            or self.plan.measures
        ):
            return None
        if (widths := self.plan.allocate(None)) is not None:
            self.plan.check_widths(widths)
        return widths

    def _measure_and_cut(self, widths: Widths) -> None:
        """Measure a stage, fit the bases in it, cut it, and go on: moments of one stage are in memory."""
        cuts = Cuts(self.bases, widths)
        wanted = self.plan.of_dense()
        keys = [(name, s) for name, statistics in wanted.items() for s in statistics]
        shelf = self.calibration.shelf
        with timed(self.seconds, "calibrate"):
            missing = shelf.missing(keys)
        kept = self.calibration.room(missing)

        def leave(edge: Edge | None, moments: Moments) -> None:
            if edge is None:
                return
            start = time.perf_counter()
            shelf.put(moments) if kept else check_finite(moments)
            for name in self.layout.inside(edge):
                if (unit := self.bases.unit_of.get(name)) is None:
                    continue
                known = self.calibration.known(unit, unit.needs, moments)
                with timed(self.seconds, "fit"):
                    self.bases.fit_dense(unit, known)
                with timed(self.seconds, "slice"):
                    cuts.of([name], known)
            with timed(self.seconds, "slice"):
                self._cut_stage(edge, cuts)
            between[0] += time.perf_counter() - start

        between = [0.0]
        if not missing:
            for edge in self.progress(self.layout.edges, "slice", self.layout.depth):
                leave(edge, Moments())
            return
        start = time.perf_counter()
        self.calibration.walk(missing, leave)
        spent = time.perf_counter() - start - between[0]
        self.seconds["calibrate"] = self.seconds.get("calibrate", 0.0) + spent

    def _cut_stage(self, edge: Edge, cuts: Cuts) -> None:
        """Change what meets a stage, and be done with it."""
        names = [n for n in spaces_of(self.layout, edge) if n in self.bases.unit_of]
        changes = cuts.of(names)
        self._take(changes)
        self.parts.hold(edge)
        self.parts.change(changes, [edge])
        self.parts.change_ends(changes)
        self._finish(edge)
        cuts.forget(n for n in names if n != edge.target)

    # --- Sequential orders: bases are fitted behind the cuts before them.

    def _sequential(self) -> tuple[Widths, dict[float, Widths], dict[float, Foretold]]:
        plan = self.plan
        self.calibration.measure(plan.compared)
        influence = self._influence()
        widths = plan.allocate(None, influence=influence)
        self.calibration.measure(plan.of_dense())
        self._fit([u for u in plan.units if widths is None or plan.stands(u)])
        chosen = self._allocate(influence) if widths is None else widths
        plan.check_widths(chosen)
        self.bases.keep_only(u for u in plan.units if plan.stands(u))
        self._begin([chosen], chosen)
        self._walk_sequentially(chosen)
        return chosen, {}, {}

    def _walk_sequentially(self, widths: Widths) -> None:
        cuts = Cuts(self.bases, widths)

        def decide(name: str, moments: Moments) -> Change:
            unit = self.bases.unit_of[name]
            with timed(self.seconds, "fit"):
                if unit.space.name not in self.bases:
                    self.bases.fit(unit, moments)
                ahead = self.plan.stands(unit)
                change = cuts.of([name], None if ahead else moments)[name]
            self._take({name: change})
            cuts.forget([name])
            return change

        wanted = {
            m: frozenset() if self.plan.stands(u) else u.needs & MEASURED
            for m, u in self.bases.unit_of.items()
        }
        batches: list[Batch] = []
        start = time.perf_counter()
        before = self.seconds.get("fit", 0.0)
        dtype = torch.float32
        if self.plan.reads_tokens:
            batches, dtype = self.calibration.batches()
        walk.sequential(
            self.parts,
            batches,
            wanted,
            dtype,
            decide,
            follow=self.plan.follows,
            readers=self.plan.recipe.refit == "both",
            stay=self.layout.stages(widths),
            streams=self.calibration.streams,
            joined=self.plan.ranks,
            finish=self._finish,
            progress=self.progress,
        )
        spent = time.perf_counter() - start - (self.seconds.get("fit", 0.0) - before)
        self.seconds["calibrate"] = self.seconds.get("calibrate", 0.0) + spent

    # --- What both have in common.

    def _begin(self, choices: Sequence[Widths], chosen: Widths) -> None:
        """Before the first cut: measure what is to foretell its loss, and tell the receiver."""
        self._measure_gradients(choices)
        self.lost = None if self.gradients is None else predict.Lost(self.gradients, chosen)
        if self.means.receiver is not None:
            self.means.receiver.begin(self.parts, chosen)

    def _take(self, changes: Mapping[str, Change]) -> None:
        """Note what is asked of changes after they are made."""
        with timed(self.seconds, "predict"):
            for name, change in changes.items():
                if name in self.encodes:
                    continue
                if self.lost is not None:
                    self.lost.add(name, change)
                if self.layout.spaces[name].kind == "residual":
                    first = self.bases.unit_of[name].space.name  # spaces with one basis share it
                    self.encodes.add(name, first, change.encode.matrix()[0].float)

    def _finish(self, edge: Edge) -> None:
        join(self.parts.hold(edge))
        if self.means.receiver is not None:
            self.means.receiver.stage(self.parts, edge)
            self.parts.free(edge)

    def _fit(self, units: Sequence[Unit]) -> None:
        with timed(self.seconds, "fit"):
            for unit in self.progress(units, "fit bases", len(units)):
                self.bases.fit_dense(unit, self.calibration.known(unit, unit.needs))

    def _fit_joint(self) -> None:
        """What methods give that see the model, and where a selector needs no energies, the widths that it will have."""
        with timed(self.seconds, "fit"):
            for units in self.plan.joined:
                known = self.plan.allocate(None)
                names = (u.space.name for u in units)
                widths = None if known is None else {n: self.layout.width(n, known) for n in names}
                self.bases.fit_joint(units, widths)

    def _influence(self) -> list[float] | None:
        """1 - E[cos(stream into, stream out of)] of every block, where a selector asks for it."""
        keys = [(p, Statistic.COSINE) for p in self.plan.compared]
        known = self.calibration.shelf.get(keys).known if keys else {}
        return [1 - known[key].mean.item() for key in keys] if keys else None

    def _narrower(self, influence: list[float] | None, widest: Widths) -> dict[float, Widths]:
        """The widths of the nested members, each within those of the next wider one."""
        found, within = dict[float, Widths](), widest
        for share, plan in self.plan.narrower().items():
            within = self._allocate(influence, plan, within)
            plan.check_attention(within)
            found[share] = within
        return found

    def _allocate(
        self, influence: list[float] | None, plan: Plan | None = None, within: Widths | None = None
    ) -> Widths:
        loss = None if self.held is None else self._held_out(self.held)
        start = time.perf_counter()
        with timed(self.seconds, "select"):
            widths = (plan or self.plan).allocate(self.bases.spectra, loss, influence, within)
        if loss is not None:
            counts = {"evaluations": len(loss.losses), "measured": loss.measured}
            spent = {**counts, "seconds": round(time.perf_counter() - start, 3)}
            before = self.search or {}
            self.search = {key: value + before.get(key, 0) for key, value in spent.items()}
        assert widths is not None
        return widths

    def _held_out(self, tokens: Tokens) -> HeldOut:
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
            hashed = hashlib.sha256(identity.encode()).hexdigest()[:32]
            path = store.folder / f"losses.{hashed}.json"

        def cut(widths: Mapping[Unit, int]) -> dict[str, Change]:
            cuts = Cuts(self.bases, {u.space.name: k for u, k in widths.items()})
            return cuts.of(m for u in widths for m in u.members)

        model = self.parts.whole(torch.float32)
        units, batch = self.plan.units, calibrate.batch
        return HeldOut(model, self.layout, units, cut, tokens, batch, self.progress, path)

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
        key = ("gradients", *self.bases.source(), self.tokens.digest(), skip, *spaces)
        with timed(self.seconds, "predict"):
            make = partial(
                predict.measure, self.parts, spaces, self.tokens, self.progress, skip=skip
            )
            self.gradients = self.memo.once(key, make, lambda found: found.nbytes)

    def _foretell(self, widths: Widths, lost: predict.Lost | None) -> Foretold:
        nats = float("nan") if lost is None else lost.nats
        return foretell(self.plan.units, widths, self.bases.spectra, lambda: nats)

    def _foretell_member(self, widths: Widths) -> Foretold:
        with timed(self.seconds, "predict"):
            lost = None if self.gradients is None else predict.Lost(self.gradients, widths)
            if lost is not None:
                for name, change in Cuts(self.bases, widths).of(self.bases.unit_of).items():
                    lost.add(name, change)
            return self._foretell(widths, lost)

    def _certify(self) -> Certificate:
        """The certificate of all bases at once, on probe tokens that need no text."""
        recipe, shared = self.plan.recipe, self.bases.shared
        ids = probe(self.source.config.vocab_size, recipe.seed, self.tokens)
        with timed(self.seconds, "verify"):
            asked = json.dumps([shared, self.plan.fold, recipe.tie, recipe.seed])
            weights = self.memo.weights(self.source)
            first = dict.fromkeys(shared.values())
            every = (t for n in first for t in self.bases[n].tensors)
            rotation = digest(f"{weights} {asked}", chain(every, [ids]))
            make = partial(
                certify,
                self.source,
                Rotations(self.bases, shared),
                ids,
                fold=self.plan.fold,
                tie=recipe.tie,
                seed=recipe.seed,
                device=self.means.device,
                progress=self.progress,
            )
            certificate = self.memo.once(("certificate", rotation), make)
        if not certificate.passed:
            raise CertificateError(f"{certificate.failure}. Nothing is written.")
        return certificate
