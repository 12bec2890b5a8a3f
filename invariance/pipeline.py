"""The data flow of a run: plan, canonicalize, calibrate, fit, verify, select, slice."""

from __future__ import annotations

import hashlib
import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import transformers
from jaxtyping import Float64
from psutil import virtual_memory
from torch import Tensor
from transformers import PreTrainedModel

from . import fisher, walk
from .budget import Predicted
from .canonical import canonicalize, join
from .data import Tokens
from .demand import Unit, Widths
from .errors import CertificateError, InputError, InvarianceError
from .heldout import HeldOut, split
from .interfaces import Statistic
from .layout import Layout
from .memo import Memo, digest
from .moments import Key, Moments, Store, check_finite, reader_moment
from .plan import MEASURED, Plan
from .refit import HELD_OUT
from .reparametrize import reparametrize
from .shortcuts import Chain
from .space import Basis, Change
from .verify import Certificate, certify, double_copy

PROBE_TOKENS = 64
MOMENTS_FORMAT = "4"  # counts up when moments of the same model and tokens come out different


@dataclass
class Sliced:
    """What slicing gives: the changed model (float64, blocks restructured), its layout, and how it came about."""

    model: PreTrainedModel
    layout: Layout
    widths: Widths
    spectra: dict[str, Float64[Tensor, "c d"]]
    certificate: Certificate
    seconds: dict[str, float] = field(default_factory=dict)
    predicted: float | None = None  # the loss in nats per token, where selectors or energies tell
    energy: dict[str, float] = field(default_factory=dict)  # kind of space → which share of its energy is cut
    search: dict[str, float] | None = None  # what a selector that measures asked for
    encodes: dict[str, Float64[Tensor, "d k"]] = field(
        default_factory=dict
    )  # of the points of the stream that changed
    narrower: dict[float, Widths] = field(default_factory=dict)  # the nested members' by their shares
    losses: dict[float, float | None] = field(default_factory=dict)  # predicted of those


@contextmanager
def timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    """Add what a step takes to its entry."""
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[step] = seconds.get(step, 0.0) + time.perf_counter() - start


def calibration_dtype(asked: str, device: torch.device) -> torch.dtype:
    """``auto`` is the fastest that the machine multiplies in: bfloat16 where it has units for it, else float32."""
    if asked != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[asked]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


@dataclass(frozen=True)
class Share:
    """One process's share of the calibration: every ``of``-th batch, and what adds up the moments of all shares."""

    rank: int
    of: int
    add: Callable[[Moments], Moments]


def calibrate(model: PreTrainedModel, plans: Sequence[Plan], tokens: Tokens, *, store: Path, memo: Memo | None = None,
              progress: walk.Progress = walk.quiet, share: Share | None = None) -> None:  # fmt: skip
    """Measure, in one walk, what several plans ask of the dense model, and keep it for them in ``store``.

    The plans must have one ``calibration``, so that what they ask is kept under one hash.
    """
    _Run(model, plans[0], tokens, store, progress, memo or Memo(), share).calibrate_for(plans)


def slice_model(model: PreTrainedModel, plan: Plan, tokens: Tokens | None, *, store: Path | None = None,
                progress: walk.Progress = walk.quiet, memo: Memo | None = None) -> Sliced:  # fmt: skip
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

    def __init__(self, model: PreTrainedModel, plan: Plan, tokens: Tokens | None, store: Path | None,
                 progress: walk.Progress, memo: Memo, share: Share | None = None) -> None:  # fmt: skip
        self.original, self.plan, self.tokens, self.progress = model, plan, tokens, progress
        self.store, self.memo, self.share = store, memo, share
        self.held: Tokens | None = None
        self.search: dict[str, float] | None = None
        if plan.measures:
            assert tokens is not None
            self.tokens, self.held = split(tokens, plan.recipe.where("calibrate"))
        self.seconds: dict[str, float] = {}
        self.unit_of = {m: u for u in plan.units for m in u.members}
        self.streams: walk.Streams = (
            deque()
        )  # of the dense model, where a walk beside it follows and memory allows
        self.bases: dict[str, Basis] = {}  # by a unit's first member
        self.changes: dict[str, Change] = {}
        self._check_tokens()
        with timed(self.seconds, "canonicalize"):
            self.model = double_copy(model)
            self.layout = canonicalize(
                self.model, fold=plan.fold, tie=plan.recipe.tie, split=plan.layout.select(["edge"])
            )

    def run(self) -> Sliced:
        plan = self.plan
        self.curved = self._stored(plan.gradients, self._measure_gradients)
        if plan.recipe.order == "oneshot":
            moments = self._calibrate(plan.of_dense())
            self._fit(plan.units, moments)
            chosen = self._allocate(moments, self._influence(moments))
            plan.check_widths(chosen)
            narrower = self._narrower(moments, chosen)
            certificate = self._certify()
            with timed(self.seconds, "slice"):
                self.changes = self._cut(plan.units, moments, chosen)
                reparametrize(self.model, self.layout, self.changes)
        else:
            influence = self._influence(self._calibrate(plan.compared))
            widths: Widths | None = plan.allocate(None, influence=influence)
            ahead = [u for u in plan.units if widths is None or plan.stands(u)]
            moments = self._calibrate(plan.of_dense())
            self._fit(ahead, moments)
            chosen = self._allocate(moments, influence) if widths is None else widths
            plan.check_widths(chosen)
            self.bases = {n: b for n, b in self.bases.items() if plan.stands(self.unit_of[n])}
            self._walk_sequentially(moments, chosen)
            certificate = self._certify()
            narrower = {}
        join(self.model)
        spectra = {name: basis.energy for name, basis in self.bases.items()}
        encodes = {
            n: c.encode[0] for n, c in self.changes.items() if self.layout.spaces[n].kind == "residual"
        }
        return Sliced(
            self.model,
            self.layout,
            chosen,
            spectra,
            certificate,
            self.seconds,
            self._predicted(chosen),
            self._energy(chosen),
            self.search,
            encodes,
            narrower,
            {share: self._predicted(widths) for share, widths in narrower.items()},
        )

    def calibrate_for(self, plans: Sequence[Plan]) -> None:
        """All that the plans ask of the dense model, into the store."""
        if not self.share:
            keys = dict.fromkeys(key for plan in plans for key in plan.gradients)
            self._stored(list(keys), self._measure_gradients)
        self._calibrate(walk.together(*(plan.of_dense() for plan in plans)))

    def _check_tokens(self) -> None:
        if not self.plan.reads_tokens:
            return
        assert self.plan.recipe.calibrate is not None and self.tokens is not None
        where = self.plan.recipe.where("calibrate")
        count, sequences = int(self.tokens.mask.sum()), len(self.tokens.ids)
        widest = max((self.unit_of[n].space for n in self.plan.wanted()), key=lambda s: s.seen, default=None)
        if widest is not None and count < widest.seen:
            raise InputError(
                f"{where}: {count} tokens cannot tell the {widest.seen} directions of space "
                f"'{widest.name}' apart. Calibrate on at least {widest.seen} tokens; {8 * widest.seen} and more are better."
            )
        if self.plan.follows and sequences < HELD_OUT:
            raise InputError(
                f"{where}: {sequences} sequences, and order 'dense_target' holds out one in {HELD_OUT} to choose its "
                f"shrinkage. Calibrate on {HELD_OUT} sequences at least; 32 and more are better."
            )

    def _batches(self) -> tuple[list[walk.Batch], torch.dtype]:
        calibrate = self.plan.recipe.calibrate
        assert calibrate is not None and self.tokens is not None
        dtype, stream = self._dtypes()
        tokens = list(self.tokens.batches(calibrate.batch))
        if self.share:
            tokens = tokens[self.share.rank :: self.share.of]
        batches = walk.enter(self.model, self.layout, tokens, dtype, stream)
        for batch, (_, mask) in zip(batches, tokens, strict=True):
            if calibrate.skip:  # the tokens pass the model, and no moment sees them
                batch.mask = mask.clone()
                batch.mask[:, : calibrate.skip] = False
        return batches, dtype

    def _dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """What branches compute in, and what the stream is kept in."""
        assert self.plan.recipe.calibrate is not None
        dtype = calibration_dtype(self.plan.recipe.calibrate.dtype, self.model.device)
        # Following the dense stream needs the small difference of two large streams.
        return dtype, torch.float32 if self.plan.follows else dtype

    def _calibrate(self, wanted: walk.Wanted) -> Moments:
        """The moments of the dense model: from the store where it has them, else from one walk."""
        return self._stored(
            [(name, s) for name, statistics in wanted.items() for s in statistics], self._measure
        )

    def _stored(self, keys: list[Key], measure: Callable[[list[Key]], Moments]) -> Moments:
        """The moments of the keys, those measured that the store has not."""
        if not keys:
            return Moments()
        with timed(self.seconds, "calibrate"):
            store = self._keyed_store()
            moments = store.load(keys) if store else Moments()
            missing = [key for key in keys if key not in moments.known]
            if missing:
                found = measure(missing)
                check_finite(found)
                if store and (self.share is None or self.share.rank == 0):
                    store.save(found)
                moments = moments.merge(found)
        return moments

    def _measure(self, keys: list[Key]) -> Moments:
        wanted: dict[str, frozenset[Statistic]] = {}
        for name, statistic in keys:
            wanted[name] = wanted.get(name, frozenset()) | {statistic}
        batches, dtype = self._batches()
        self.streams.clear()
        kept = self.streams if self.plan.follows and self._streams_fit(batches) else None
        found = walk.oneshot(self.model, self.layout, batches, wanted, dtype, self.progress, kept)
        return self.share.add(found) if self.share else found

    def _streams_fit(self, batches: list[walk.Batch]) -> bool:
        """Whether all that leaves the dense model's stages fits into a third of the memory that is free."""
        device = self.model.device
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else virtual_memory().available
        kept = sum(2 if edge.post else 1 for edge in self.layout.edges)
        return 3 * kept * sum(batch.x.nbytes for batch in batches) <= free

    def _measure_gradients(self, keys: list[Key]) -> Moments:
        assert self.tokens is not None
        points, queries = ([n for n, s in keys if s is of] for of in (Statistic.FISHER, Statistic.TAYLOR))
        return fisher.measure(self.model, self.layout, points, self.tokens, self.progress, queries=queries)

    def _keyed_store(self) -> Store | None:
        if self.store is None:
            return None
        assert self.tokens is not None and self.plan.recipe.calibrate is not None
        dtype, stream = self._dtypes()
        skip = self.plan.recipe.calibrate.skip
        return Store.keyed(
            self.store,
            {
                "format": MOMENTS_FORMAT,
                "transformers": transformers.__version__,
                "weights": self.memo.weights(self.original),
                "config": self.original.config.to_json_string(use_diff=False),
                "tokens": self.tokens.digest(),
                "folded": str(self.layout.folded),
                "dtype": str(dtype),
                "stream": str(stream),
                "device": self.model.device.type,
            }
            | ({"skip": str(skip)} if skip else {}),
        )

    def _moments_of(self, unit: Unit, moments: Moments) -> Moments:
        """What a unit's methods read, under the name of its first member."""
        for member in unit.members if Statistic.READERS in unit.needs else ():
            found = reader_moment(self.model, self.layout, self.layout.spaces[member])
            moments = moments.merge(Moments({(member, Statistic.READERS): found}))
        for member in unit.members if Statistic.FISHER in unit.needs else ():
            found = fisher.moment(self.model, self.layout, self.layout.spaces[member], self.curved)
            moments = moments.merge(Moments({(member, Statistic.FISHER): found}))
        if Statistic.TAYLOR in unit.needs:
            keys = [(member, Statistic.TAYLOR) for member in unit.members]
            moments = moments.merge(Moments({key: self.curved.known[key] for key in keys}))
        return (moments.beside if unit.joint else moments.pooled)(unit.members, unit.space.name)

    def _fit(self, units: tuple[Unit, ...] | list[Unit], moments: Moments) -> None:
        with timed(self.seconds, "fit"):
            source = self._source()
            for unit in self.progress(units, "fit bases", len(units)):
                key = ("basis", *source, unit.members, unit.fitted, json.dumps(unit.rotate.spec()))
                self.bases[unit.space.name] = self.memo.once(
                    key, partial(self._basis, unit, moments), lambda basis: basis.A.nbytes
                )

    def _source(self) -> tuple[str, ...]:
        """What bases of the dense model are fitted to, beside a method and its options: weights, form, moments."""
        store = self._keyed_store() if self.plan.reads_tokens else None
        form = f"{self.layout.folded} {self.plan.recipe.tie} {self.plan.layout.select(['edge'])}"
        return self.memo.weights(self.original), form, store.folder.name if store else ""

    def _basis(self, unit: Unit, moments: Moments) -> Basis:
        basis = unit.rotate.fit(unit.fitted, self._moments_of(unit, moments))
        if not unit.fitted.contains(basis.A):
            raise InvarianceError(
                f"rotator '{unit.rotate.name}' gave space '{unit.space.name}' a basis outside the group "
                f"'{unit.space.group.value}', so it would not be exact. This is a fault of the method, not of the recipe."
            )
        if unit.joint:
            first, *others = basis.A.split(unit.space.copies)
            if not all(torch.equal(first, other) for other in others):
                raise InvarianceError(
                    f"rotator '{unit.rotate.name}' says that it gives all layers one basis, and gave space "
                    f"'{unit.space.name}' another one than the rest. This is a fault of the method, not of the recipe."
                )
            return Basis(first, basis.energy.unflatten(0, (-1, unit.space.copies)).sum(0))
        return basis

    def _influence(self, moments: Moments) -> list[float] | None:
        """1 - E[cos(stream into, stream out of)] of every block, where a selector asks for it."""
        asked = self.plan.compared
        return [1 - moments.known[p, Statistic.COSINE].mean.item() for p in asked] if asked else None

    def _narrower(self, moments: Moments, widest: Widths) -> dict[float, Widths]:
        """The widths of the nested members, each within those of the next wider one."""
        found, within = dict[float, Widths](), widest
        for share, plan in self.plan.narrower().items():
            within = self._allocate(moments, self._influence(moments), plan, within)
            plan.check_attention(within)
            found[share] = within
        return found

    def _allocate(self, moments: Moments, influence: list[float] | None, plan: Plan | None = None,
                  within: Widths | None = None) -> Widths:  # fmt: skip
        spectra = {name: basis.energy for name, basis in self.bases.items()}
        loss = None if self.held is None else self._held_out(self.held, moments)
        start = time.perf_counter()
        with timed(self.seconds, "select"):
            widths = (plan or self.plan).allocate(spectra, loss, influence, within)
        if loss is not None:
            counts = {"evaluations": len(loss.losses), "measured": loss.measured}
            spent, before = {**counts, "seconds": round(time.perf_counter() - start, 3)}, self.search or {}
            self.search = {key: value + before.get(key, 0) for key, value in spent.items()}
        assert widths is not None
        return widths

    def _held_out(self, tokens: Tokens, moments: Moments) -> HeldOut:
        store, path = self._keyed_store(), None
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
            path = store.folder / f"losses.{hashlib.sha256(identity.encode()).hexdigest()[:32]}.json"

        def cut(widths: Mapping[Unit, int]) -> dict[str, Change]:
            return self._cut(widths, moments, {u.space.name: k for u, k in widths.items()})

        return HeldOut(
            self.model, self.layout, self.plan.units, cut, tokens, calibrate.batch, self.progress, path
        )

    def _predicted(self, widths: Widths) -> float | None:
        """The loss that selectors predict of widths; else the energies that widths lose, where those of all spaces that
        are cut are losses in nats per token, and assume the refit that the slicer makes, or none."""
        if isinstance(widths, Predicted):
            return widths.loss
        cut = [u for u in self.plan.units if widths[u.space.name] < u.space.dim]
        if not all(u.rotate.nats and u.slice is not None and u.slice.mixes == u.rotate.refits for u in cut):
            return None
        return sum(self.bases[u.space.name].energy[:, widths[u.space.name] :].sum().item() for u in cut)

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
        return {m: c for u in units for c in (self._change(u, moments, widths, chain),) for m in u.members}

    def _change(self, unit: Unit, moments: Moments, widths: Widths, chain: Chain) -> Change:
        """The change of a unit, which ``chain`` turns where a shortcut of low rank leads to it."""
        change = self._cut_alone(unit, moments, widths)
        if unit.rank is None:
            return change
        return chain.add(
            unit.space.name, change, self._moments_of(unit, moments).second(unit.space, "seen")[0]
        )

    def _cut_alone(self, unit: Unit, moments: Moments, widths: Widths) -> Change:
        basis = self.bases[unit.space.name]
        k = widths[unit.space.name]
        if not k:
            return Change.empty(unit.space, 0)
        if unit.slice is None or k == unit.space.dim:
            return Change.rotation(basis.A)  # what was certified
        return unit.slice.cut(unit.space, basis, k, self._moments_of(unit, moments))

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
            m: frozenset() if self.plan.stands(u) else u.needs & MEASURED for m, u in self.unit_of.items()
        }
        batches: list[walk.Batch] = []
        start = time.perf_counter()
        before = self.seconds.get("fit", 0.0)
        dtype = torch.float32
        if self.plan.reads_tokens:
            batches, dtype = self._batches()
        walk.sequential(self.model, self.layout, batches, wanted, dtype, decide,
                        follow=self.plan.follows, readers=self.plan.recipe.refit == "both",
                        stay=self.layout.stages(widths), streams=self.streams, joined=self.plan.ranks,
                        progress=self.progress)  # fmt: skip
        spent = time.perf_counter() - start - (self.seconds.get("fit", 0.0) - before)
        self.seconds["calibrate"] = self.seconds.get("calibrate", 0.0) + spent
        self.changes = {m: decided[u.space.name] for m, u in self.unit_of.items() if u.space.name in decided}

    def _certify(self) -> Certificate:
        """The certificate of all bases at once, on probe tokens that need no text."""
        bases: Mapping[str, Tensor] = {m: self.bases[u.space.name].A for m, u in self.unit_of.items()}
        g = torch.Generator().manual_seed(self.plan.recipe.seed)
        ids = torch.randint(0, self.original.config.vocab_size, (2, PROBE_TOKENS // 2), generator=g)
        if self.tokens is not None:
            ids = self.tokens.ids[:1, :PROBE_TOKENS]
        with timed(self.seconds, "verify"):
            asked = json.dumps([[*bases], self.plan.fold, self.plan.recipe.tie, self.plan.recipe.seed])
            different = {id(A): A for A in (*bases.values(), ids)}  # segments share theirs
            places = {at: n for n, at in enumerate(different)}
            which = [places[id(A)] for A in bases.values()]
            rotation = digest(f"{self.memo.weights(self.original)} {asked} {which}", different.values())
            certificate = self.memo.once(
                ("certificate", rotation),
                lambda: certify(self.original, bases, ids, fold=self.plan.fold, tie=self.plan.recipe.tie,
                                seed=self.plan.recipe.seed),
            )  # fmt: skip
        if not certificate.passed:
            raise CertificateError(f"{certificate.failure}. Nothing is written.")
        return certificate
