"""The data flow of a run: plan, canonicalize, calibrate, fit, verify, select, slice."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from ..calibrate import walk
from ..calibrate.batch import Batch
from ..calibrate.beside import Following
from ..calibrate.certificate import spaces_of
from ..calibrate.moments import Moments, check_finite
from ..core.change import Change
from ..core.spill import Shared
from ..io.data import Tokens
from ..io.source import live
from ..method.interfaces import Rotator
from ..model.axes import Edge
from ..model.folding import join
from ..model.source import Source
from .bases import Bases, Cuts
from .calibration import Calibration, timed
from .choosing import Choosing
from .demand import Unit, Widths
from .exactness import certify_bases
from .foretelling import Foretelling
from .heldout import split
from .means import Means
from .plan import MEASURED, Plan
from .predict import Foretold
from .sliced import Sliced


def slice_model(
    model: PreTrainedModel | Source,
    plan: Plan,
    tokens: Tokens | None,
    means: Means | None = None,
) -> Sliced:
    """Carry out a plan on a family's model, which is left as it is.

    Where the means have a receiver, it gets the cut model part by part, and none of it stays in memory; without one, all
    of it does. Raises CertificateError when the rotations alone move the logits, InputError when the tokens are too few.
    """
    means = means or Means()
    if not isinstance(model, PreTrainedModel):
        return _Run(model, plan, tokens, means).run()
    means = replace(means, device=means.device or model.device)
    return _Run(live(model), plan, tokens, means).run()


class _Run:
    """One run's state: the working model and what is known so far."""

    def __init__(self, source: Source, plan: Plan, tokens: Tokens | None, means: Means) -> None:
        self.plan, self.means, self.progress = plan, means, means.progress
        held: Tokens | None = None
        if plan.measures:
            assert tokens is not None
            tokens, held = split(tokens, plan.recipe.where("calibrate"))
        self.encodes = Shared()
        self.calibration = Calibration(
            source,
            plan,
            tokens,
            means.store,
            means.memo,
            means.progress,
            device=means.device or "cpu",
        )
        self.parts, self.layout = self.calibration.parts, self.calibration.layout
        self.bases = Bases(plan, self.calibration)
        self.choosing = Choosing(self.bases, held)
        self.foretelling = Foretelling(self.bases)
        self.seconds = self.calibration.seconds

    def run(self) -> Sliced:
        self.calibration.measure_gradients()
        oneshot = self.plan.recipe.order == "oneshot"
        chosen, narrower, members = self._oneshot() if oneshot else self._sequential()
        certificate = certify_bases(self.bases)
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
            self.foretelling.of(chosen),
            self.bases.energy_lost(chosen),
            self.choosing.search,
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
        influence = self.choosing.influence()
        chosen = self.choosing.allocate(influence)
        plan.check_widths(chosen)
        narrower = self.choosing.narrower(influence, chosen)
        self._begin([chosen, *narrower.values()], chosen)
        members = {share: self.foretelling.of_member(widths) for share, widths in narrower.items()}
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
        influence = self.choosing.influence()
        widths = plan.allocate(None, influence=influence)
        self.calibration.measure(plan.of_dense())
        self._fit([u for u in plan.units if widths is None or plan.stands(u)])
        chosen = self.choosing.allocate(influence) if widths is None else widths
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
        cutting = walk.Cutting(wanted, decide, self.plan.ranks, self._finish)
        readers, stay = self.plan.recipe.refit == "both", self.layout.stages(widths)
        beside = Following(readers, stay, self.calibration.streams)
        follow = beside if self.plan.follows else None
        walk.sequential(self.parts, batches, dtype, cutting, follow=follow, progress=self.progress)
        spent = time.perf_counter() - start - (self.seconds.get("fit", 0.0) - before)
        self.seconds["calibrate"] = self.seconds.get("calibrate", 0.0) + spent

    # --- What both have in common.

    def _begin(self, choices: Sequence[Widths], chosen: Widths) -> None:
        """Before the first cut: measure what is to foretell its loss, and tell the receiver."""
        self.foretelling.begin(choices, chosen)
        if self.means.receiver is not None:
            self.means.receiver.begin(self.parts, chosen)

    def _take(self, changes: Mapping[str, Change]) -> None:
        """Note what is asked of changes after they are made."""
        with timed(self.seconds, "predict"):
            for name, change in changes.items():
                if name in self.encodes:
                    continue
                self.foretelling.add(name, change)
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
