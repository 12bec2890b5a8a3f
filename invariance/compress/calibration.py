"""Calibration: what a plan asks of the dense model is looked up in a store, or measured in one walk and kept there."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel

from ..calibrate import fisher, walk
from ..calibrate.batch import Batch
from ..calibrate.enter import enter
from ..calibrate.fisher import SEQUENCES
from ..calibrate.moment import Known
from ..calibrate.moments import Key, Moments, Shelf, Store, reader_moment
from ..calibrate.refit import HELD_OUT
from ..calibrate.statistic import Statistic, Wanted, together
from ..calibrate.streams import Streams
from ..core.errors import InputError
from ..core.progress import Progress, quiet
from ..io.data import Tokens
from ..io.memo import Memo
from ..io.own_text import fastest
from ..io.source import live
from ..model.axes import Edge
from ..model.layout import Layout
from ..model.source import Source
from ..model.working import Working
from .demand import Unit
from .plan import MEASURED, Plan

MOMENTS_FORMAT = "4"  # counts up when moments of the same model and tokens come out different


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
    return fastest(device)


@dataclass(frozen=True)
class Share:
    """One process's share of the calibration: every ``of``-th batch, and what adds up the moments of all shares."""

    rank: int
    of: int
    add: Callable[[Moments], Moments]


def calibrate(
    model: PreTrainedModel | Source,
    plans: Sequence[Plan],
    tokens: Tokens,
    *,
    store: Path,
    memo: Memo | None = None,
    progress: Progress = quiet,
    share: Share | None = None,
) -> None:
    """Measure, in one walk, what several plans ask of the dense model, and keep it for them in ``store``.

    The plans must have one ``calibration``, so that what they ask is kept under one hash.
    """
    source, device = model, torch.device("cpu")
    if isinstance(model, PreTrainedModel):
        source, device = live(model), model.device
    memo = memo or Memo()
    Calibration(source, plans[0], tokens, store, memo, progress, share, device).measure_for(plans)  # type: ignore[arg-type]


@dataclass(eq=False)
class Calibration:
    """What is measured of the dense model for one plan, in its canonical form, on all tokens or a process's share."""

    source: Source
    plan: Plan
    tokens: Tokens | None
    store: Path | None
    memo: Memo
    progress: Progress = quiet
    share: Share | None = None
    device: str | torch.device = "cpu"
    seconds: dict[str, float] = field(default_factory=dict)
    streams: Streams = field(default_factory=Streams)  # left over for a walk beside it
    curved: Moments = field(default_factory=Moments)  # of gradients

    def __post_init__(self) -> None:
        """Raises InputError where the tokens are too few."""
        self._check_tokens()
        with timed(self.seconds, "canonicalize"):
            split = self.plan.layout.select(["edge"])
            fold, tie = self.plan.fold, self.plan.recipe.tie
            self.parts = Working(self.source, fold=fold, tie=tie, split=split, device=self.device)
            self.layout: Layout = self.parts.layout
        self.shelf = Shelf(self.kept(), self.share is None or self.share.rank == 0)

    def measure_gradients(self) -> None:
        """What backward passes tell, for the methods of the plan's units (``of``)."""
        keys = self.plan.gradients
        with timed(self.seconds, "calibrate"):
            if missing := self.shelf.missing(keys):
                self.shelf.put(self._gradients(missing))
            self.curved = self.shelf.get(keys)

    def measure(self, wanted: Wanted) -> None:
        """Have the moments of the dense model on the shelf: those that are not there, from one walk."""
        keys = [(name, s) for name, statistics in wanted.items() for s in statistics]
        with timed(self.seconds, "calibrate"):
            if missing := self.shelf.missing(keys):
                self.walk(missing, lambda edge, found: self.shelf.put(found))

    def measure_for(self, plans: Sequence[Plan]) -> None:
        """All that the plans ask of the dense model, into the store."""
        if not self.share:
            keys = list(dict.fromkeys(key for plan in plans for key in plan.gradients))
            if missing := self.shelf.missing(keys):
                self.shelf.put(self._gradients(missing))
        self.measure(together(*(plan.of_dense() for plan in plans)))

    def room(self, keys: Iterable[Key]) -> bool:
        """Whether the moments of these keys take a quarter of what is free on the store's disk at most."""
        if self.store is None:
            return True
        spaces = [self.layout.spaces[name] for name, _ in keys]
        asked = sum(8 * s.copies * s.seen**2 for s in spaces)
        there = next(p for p in (self.store, *self.store.parents) if p.is_dir())
        return 4 * asked <= shutil.disk_usage(there).free

    def known(self, unit: Unit, needs: frozenset[Statistic], now: Moments | None = None) -> Moments:
        """What there is of a unit's members: ``now``, and what only the shelf has. Of spaces that share a basis it is the
        sum, under the first one's name; they are added up one by one."""
        found: dict[Key, Known] = {}
        for member in unit.members:
            for statistic in needs & MEASURED:
                key = member, statistic
                moment = now.known.get(key) if now is not None else None
                moment = moment or self.shelf.get([key]).known[key]
                into = key if unit.side_by_side else (unit.space.name, statistic)
                found[into] = found[into] + moment if into in found else moment
        return Moments(found)

    def of(self, unit: Unit, moments: Moments) -> Moments:
        """What a unit's methods read, under the name of its first member."""
        for member in unit.members if Statistic.READERS in unit.needs else ():
            gram = reader_moment(self.parts, self.layout.spaces[member])
            moments = moments.merge(Moments({(member, Statistic.READERS): gram}))
        for member in unit.members if Statistic.FISHER in unit.needs else ():
            found = fisher.moment(self.parts, self.layout.spaces[member], self.curved)
            moments = moments.merge(Moments({(member, Statistic.FISHER): found}))
        if Statistic.TAYLOR in unit.needs:
            keys = [(member, Statistic.TAYLOR) for member in unit.members]
            moments = moments.merge(Moments({key: self.curved.known[key] for key in keys}))
        return unit.together(moments)

    def batches(self) -> tuple[list[Batch], torch.dtype]:
        """The tokens in front of the first block, and what branches compute in."""
        calibrate = self.plan.recipe.calibrate
        assert calibrate is not None and self.tokens is not None
        dtype, stream = self._dtypes()
        tokens = list(self.tokens.batches(calibrate.batch))
        if self.share:
            tokens = tokens[self.share.rank :: self.share.of]
        batches = enter(self.parts, tokens, dtype, stream)
        for batch, (_, mask) in zip(batches, tokens, strict=True):
            if calibrate.skip:  # the tokens pass the model, and no moment sees them
                batch.mask = mask.clone()
                batch.mask[:, : calibrate.skip] = False
        return batches, dtype

    def kept(self) -> Store | None:
        """Where these moments lie in the store, by all that they hang on; None without a store."""
        if self.store is None or not self.plan.reads_tokens:
            return None
        assert self.tokens is not None and self.plan.recipe.calibrate is not None
        dtype, stream = self._dtypes()
        calibrate = self.plan.recipe.calibrate
        return Store.keyed(
            self.store,
            {
                "format": MOMENTS_FORMAT,
                "transformers": transformers.__version__,
                "weights": self.memo.weights(self.source),
                "config": self.source.config.to_json_string(use_diff=False),
                "tokens": self.tokens.digest(),
                "folded": str(self.layout.folded),
                "dtype": str(dtype),
                "stream": str(stream),
                "device": self.parts.device.type,
            }
            | ({"skip": str(calibrate.skip)} if calibrate.skip else {})
            | ({"fisher": str(calibrate.fisher)} if calibrate.fisher != SEQUENCES else {}),
        )

    def _check_tokens(self) -> None:
        if not self.plan.reads_tokens:
            return
        assert self.plan.recipe.calibrate is not None and self.tokens is not None
        where = self.plan.recipe.where("calibrate")
        count, sequences = int(self.tokens.mask.sum()), len(self.tokens.ids)
        measured = [
            u.space for u in self.plan.units if any(m in self.plan.wanted() for m in u.members)
        ]
        widest = max(measured, key=lambda s: s.seen, default=None)
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

    def _dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """What branches compute in, and what the stream is kept in."""
        assert self.plan.recipe.calibrate is not None
        dtype = calibration_dtype(self.plan.recipe.calibrate.dtype, self.parts.device)
        # Following the dense stream needs the small difference of two large streams.
        return dtype, torch.float32 if self.plan.follows else dtype

    def walk(self, keys: list[Key], leave: walk.Leave) -> None:
        """Measure keys in one walk; ``leave`` gets the moments of each stage (``walk.oneshot``)."""
        wanted: dict[str, frozenset[Statistic]] = {}
        for name, statistic in keys:
            wanted[name] = wanted.get(name, frozenset()) | {statistic}
        batches, dtype = self.batches()
        self.streams.clear()
        kept = self.streams if self.plan.follows and self._streams_fit(batches) else None
        share = self.share

        def left(edge: Edge | None, found: Moments) -> None:
            leave(edge, share.add(found) if share else found)

        walk.oneshot(self.parts, batches, wanted, dtype, self.progress, leave=left, streams=kept)

    def _streams_fit(self, batches: list[Batch]) -> bool:
        """Whether all that leaves the dense model's stages fits into a quarter of the disk that is free for it."""
        kept = sum(2 if edge.post else 1 for edge in self.layout.edges)
        free = shutil.disk_usage(tempfile.gettempdir()).free
        return 4 * kept * sum(batch.x.nbytes for batch in batches) <= free

    def _gradients(self, keys: list[Key]) -> Moments:
        calibrate = self.plan.recipe.calibrate
        assert self.tokens is not None and calibrate is not None
        points, queries = (
            [n for n, s in keys if s is of] for of in (Statistic.FISHER, Statistic.TAYLOR)
        )
        return fisher.measure(
            self.parts,
            points,
            self.tokens,
            self.progress,
            queries=queries,
            part=fisher.Part(calibrate.fisher, calibrate.skip),
        )
