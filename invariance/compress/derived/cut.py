"""A plan on a derived layout carried out: calibrate, fit, certify, choose widths, refit the readers, cut."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...calibrate.experts import Added
from ...calibrate.moment import Gram, Moment, Weights
from ...calibrate.moments import Moments, check_finite
from ...calibrate.statistic import Statistic
from ...calibrate.tap import Reader, Seen, tapped
from ...core.change import Basis
from ...core.errors import CertificateError, InputError, InvarianceError
from ...core.group import Group
from ...core.progress import Progress, quiet
from ...core.space import Space
from ...io.data import Tokens
from ...method import checked
from ...method.interfaces import Rotator
from ...model.derive.certify import TOLERANCE
from ...model.described.accept import Trial
from ...model.described.description import Kind
from ...model.described.turn import sides, turn
from ...model.described.weightless import stored
from ...model.described.whole import double, tokens
from ...model.narrow.certificate import tried
from ...model.narrow.cut import Cut
from ...model.narrow.means import without_means
from ...model.narrow.stock import differences
from ...model.verify import Certificate
from ..calibration import timed
from ..demand import Unit, Widths
from ..exactness import probe
from .elements import as_element, is_still, moving
from .layout import STREAM
from .lines import lines, read_from_kept
from .ones import centred, fixing_ones
from .plan import DerivedPlan


@dataclass
class Made:
    """The narrower model in float64, and how it came about."""

    model: PreTrainedModel
    widths: Widths
    spectra: dict[str, Tensor]
    certificate: Certificate
    cut: Cut | None  # None where nothing was narrower
    error: float  # ‖cut − zeroed‖ / ‖zeroed‖
    seconds: dict[str, float]
    energy: dict[str, float] = field(default_factory=dict)
    why: str = ""  # no stock config says it; empty where one does


def carry_out(
    model: PreTrainedModel, plan: DerivedPlan, found: Tokens | None, progress: Progress = quiet
) -> Made:
    """Carry out a plan on a model, which is left as it is. Raises CertificateError, or InputError for widths that no
    config says."""
    return _Run(model, plan, found, progress).run()


class _Run:
    def __init__(
        self, model: PreTrainedModel, plan: DerivedPlan, found: Tokens | None, progress: Progress
    ):
        self.plan, self.found, self.progress = plan, found, progress
        self.layout, self.description = plan.layout, plan.layout.description
        self.flat = self.description.flat()
        self.seconds: dict[str, float] = {}
        self.tied = bool(self.layout.tied)
        with timed(self.seconds, "canonicalize"):
            self.twin = double(model)
            if plan.turns:
                turn(self.twin, self.description, {})  # gains folded, nothing turned
        self.bases: dict[str, Basis] = {}
        self.why = ""
        vocabulary = model.config.get_text_config().vocab_size
        self.ids = probe(vocabulary, plan.recipe.seed, None)
        cut = any(STREAM in u.members and u.slice is not None for u in plan.units)
        stream = self.layout.stream
        self.fixes_ones = stream is not None and stream.kind is Kind.O1
        if cut and self.fixes_ones:
            without_means(self.twin, self.description, self.layout.own[STREAM], tokens(self.ids))
            self.fixes_ones = False

    def run(self) -> Made:
        self._measure()
        with timed(self.seconds, "fit"):
            for unit in self.progress(self.plan.units, "fit bases", len(self.plan.units)):
                self.bases[unit.space.name] = self._fit(unit)
        certificate = self._certify()
        spectra = {n: b.energy for n, b in self.bases.items()}
        with timed(self.seconds, "select"):
            widths = self.plan.allocate(spectra)
        assert widths is not None
        self.plan.check_widths(widths)
        with timed(self.seconds, "slice"):
            small, done, error = self._cut(widths)
        lost = self._lost(widths)
        return Made(small, widths, spectra, certificate, done, error, self.seconds, lost, self.why)

    # --- Measuring.

    def _measure(self) -> None:
        """Moments at the parameters that read each space; of the stream on the model whose gains are folded."""
        self.seen: Mapping[str, Seen] = {}
        if not self.plan.reads_tokens:
            return
        calibrate = self.plan.recipe.calibrate
        assert calibrate is not None and self.found is not None
        count = int(self.found.mask[:, calibrate.skip :].sum())
        widest = max((u.space for u in self.plan.units), key=lambda s: s.dim)
        if count < widest.dim:
            raise InputError(
                f"{self.plan.recipe.where('calibrate')}: {count} tokens cannot tell the {widest.dim} directions of space "
                f"'{widest.name}' apart. Calibrate on at least {widest.dim} tokens; {8 * widest.dim} and more are better."
            )
        routed = next((u.space for u in self.plan.units if u.space.kind == "experts"), None)
        if routed is not None and not bool(self.found.mask.all()):
            raise InputError(
                f"{self.plan.recipe.where('calibrate', 'data')}: some windows are padded, and which tokens reach the experts of "
                f"'{routed.name}' is not followed, so padding would be measured. Give longer texts, or fewer `tokens`."
            )
        batches = list(self.found.batches(calibrate.batch))
        own = {u.space.name: self.layout.own[u.space.name] for u in self.plan.units}
        with timed(self.seconds, "calibrate"):
            model = copy.deepcopy(self.twin).float()
            steps = iter(self.progress(batches, "calibrate", len(batches)))
            once = frozenset({own[STREAM]} if STREAM in own else ())
            whole = [n for n in own if self.layout.spaces[n].kind == "experts"]
            signals = {n: o for n, o in own.items() if n not in whole}
            added = Added(model, self.flat, [own[n] for n in whole])
            where = {o: self.layout.places(n) for n, o in signals.items()}
            seen = tapped(model, where, once, steps, calibrate.skip, added)
        self.seen = {name: seen[o] for name, o in signals.items()}
        self.experts = added.moments()

    def _writers_of_stream(self, seen: Seen) -> list[Reader]:
        """The readers behind which the stream is written: what they are given counts when channels are chosen. All of
        them where nothing is said of the stream."""
        writers = [
            reader
            for reader in seen.moments
            if any(p.writes for a in self.flat.of[reader[0]] for p in a.axis.points)
        ]
        return writers or list(seen.moments)

    def _moments(self, space: Space, readers: list[Reader]) -> Moments:
        """Of some readers together, under every name that methods ask for it by; each token counts alike."""
        seen = self.seen[space.name]
        moment = seen.total(readers)
        if space.kind == "mlp":
            moment = _steadied(moment)
        if space.kind == "residual" and self.layout.stream is not None:
            moment = centred(moment) if self.fixes_ones else moment
        of = (
            (Statistic.NORMED,) if space.kind == "residual" else (Statistic.WEIGHTED, Statistic.RAW)
        )
        found = Moments({(space.name, s): moment for s in of})
        check_finite(found)
        gram = Gram(space.copies, space.seen, lambda: self._weights(space, seen.readers))
        return found.merge(Moments({(space.name, Statistic.READERS): gram}))

    def _known(self, space: Space) -> Moments:
        """What a rotator is given."""
        if space.kind == "experts":
            return self._of_experts(space)
        seen = self.seen.get(space.name)
        if seen is None:
            return Moments()
        if not seen.moments:
            raise InvarianceError(
                f"space '{space.name}': no matrix product read it on these tokens, so nothing can be measured. "
                "Calibrate on more tokens, or leave this space out."
            )
        return self._moments(space, self._writers_of_stream(seen))

    def _of_experts(self, space: Space) -> Moments:
        moment = self.experts[self.layout.own[space.name]]
        if not moment.total.any():
            raise InvarianceError(
                f"space '{space.name}': no output of an expert met a router's weight, so nothing can be measured. This type "
                "weighs experts in another way; leave this space out."
            )
        return Moments({(space.name, Statistic.EXPERTS): moment})

    def _weights(self, space: Space, readers: Collection[Reader]) -> Weights:
        """The weights that read a space: [out, copies · dim]."""
        named = stored(self.twin)
        for reader, where in self.layout.places(space.name):
            if reader in readers:
                W = lines(named[reader[0]], reader[1])
                for each in where.at:
                    yield W[torch.from_numpy(each.reshape(-1))].T, None

    # --- Fitting.

    def _fit(self, unit: Unit) -> Basis:
        assert isinstance(unit.rotate, Rotator)  # a plan refuses others
        basis = checked.fitted(unit.rotate, unit.space, self._known(unit.space))
        if basis.A.picks is not None and not basis.A.within(Group.PERMUTATION):
            raise InputError(
                f"{self.plan.recipe.where('steps', unit.step, 'rotate')}: rotator '{unit.rotate.name}' scales coordinates, and "
                "cuts of a derived layout only choose them. Use `permute`."
            )
        if unit.space.kind == "residual" and self.fixes_ones and basis.A.picks is None:
            basis = fixing_ones(basis)
        return basis

    def _certify(self) -> Certificate:
        """All bases at once on tokens that no text is needed for; then one side of each space alone."""
        chosen = {self.layout.own[n]: moving(self.layout, n, self.bases[n].A) for n in self.bases}
        with timed(self.seconds, "verify"):
            trial = Trial(self.twin, self.description, [tokens(self.ids)])
            error = trial.error(self.flat, chosen)
            controls = []
            for name, element in chosen.items():
                if is_still(element):
                    continue  # nothing that a control could leave out
                moved = 0.0
                for side in reversed(sides(self.description, name)):
                    moved = max(moved, trial.error(self.flat, {name: element}, side))
                    if moved > 1000 * TOLERANCE:
                        break
                controls.append(moved)
        certificate = Certificate(error, TOLERANCE, min(controls, default=0.0), len(chosen))
        if certificate.failure is not None and controls:
            raise CertificateError(f"the certificate failed: {certificate.failure}.")
        return certificate

    # --- Cutting.

    def _cut(self, widths: Widths) -> tuple[PreTrainedModel, Cut | None, float]:
        kept: dict[str, np.ndarray] = {}
        for unit in self.plan.units:
            name = unit.space.name
            own, k = self.layout.own[name], widths[name]
            basis = self.bases[name]
            if basis.A.picks is None:
                turn(self.twin, self.description, {own: as_element(self.layout, name, basis.A)})
                keep = np.tile(np.arange(k), (unit.space.copies, 1))
            else:
                keep = np.sort(basis.A.picks.numpy()[:, :k], axis=-1)
                if k < unit.space.dim:
                    self._refit(unit, k)
            if k < unit.space.dim:
                kept[own] = self.layout.codes(name, keep)
        if not kept:
            return self._finished(self.twin), None, 0.0
        try:
            small, done, error = tried(self.twin, self.description, kept, tokens(self.ids))
        except InputError as e:
            told = str(e).removeprefix("cut: ")
            raise InputError(f"{self.plan.recipe.where('steps')}: {told}") from None
        if not error <= TOLERANCE:
            raise CertificateError(
                f"the narrower model differs by {error:.1e} from the one whose coordinates are zero, where rounding explains "
                f"{TOLERANCE:.0e}. Cut other spaces."
            )
        why = differences(small)
        if why or not done.changes:
            name, (was, now) = next(iter(why.items()), ("its widths", ("the config's", "others")))
            self.why = f"a model of the family has {was} at {name}, and this one {now}"
            if self.plan.must:
                raise InputError(
                    f"{self.plan.recipe.where('stock')}: no stock config says what was cut: {self.why}. Use other widths, cut "
                    "other spaces, or remove `stock`."
                )
        return self._finished(small), done, error

    def _finished(self, small: PreTrainedModel) -> PreTrainedModel:
        """Tied again, where the head reads the stream as it was."""
        if self.tied and not self.plan.turns:
            small.config.get_text_config().tie_word_embeddings = True
            head, table = small.get_output_embeddings(), small.get_input_embeddings()
            assert head is not None and table is not None
            head.weight = table.weight
        return small

    def _refit(self, unit: Unit, k: int) -> None:
        """Each reader's columns that stay make up for those that go, by what that reader was given."""
        assert unit.slice is not None
        seen = self.seen.get(unit.space.name)
        if seen is None or not unit.slice.mixes:
            return
        named = stored(self.twin)
        where = dict(self.layout.places(unit.space.name))
        for reader in seen.moments:
            moments = self._moments(unit.space, [reader])
            change = checked.cut(unit.slice, unit.space, self.bases[unit.space.name], k, moments)
            for each in where[reader].at:
                read_from_kept(named[reader[0]], reader, each, change)

    def _lost(self, widths: Widths) -> dict[str, float]:
        """Kind of space → which share of its energy is cut."""
        kinds: dict[str, list[tuple[float, float]]] = {}
        for unit in self.plan.units:
            energy = self.bases[unit.space.name].energy.sum(0)
            beyond = float(energy[widths[unit.space.name] :].sum())
            kinds.setdefault(str(unit.space.kind), []).append((beyond, float(energy.sum())))
        return {
            kind: sum(b for b, _ in found) / (sum(t for _, t in found) or 1.0)
            for kind, found in kinds.items()
        }


def _steadied(moment: Moment) -> Moment:
    """Copies that few rows reached (experts) as if each had seen, besides, one row of the mean energy a channel."""
    copies, d, _ = moment.total.shape
    if copies == 1:
        return moment
    mean = moment.total.diagonal(dim1=1, dim2=2).sum() / (copies * d)
    rows = max(1.0, moment.count / copies)
    return Moment(moment.total + torch.eye(d, dtype=torch.float64) * mean / rows, moment.count)
