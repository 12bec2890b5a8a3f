"""The block walk: tokens pass the model one stage at a time, in the dense model (oneshot) or behind earlier cuts."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..core.change import Change, bridge
from ..core.memory import trim
from ..core.progress import Progress, quiet
from ..model.axes import Edge
from ..model.layout import Layout
from ..model.working import Stages
from .batch import Batch, Left
from .beside import Beside, Following
from .moments import Moments, real_tokens
from .probes import add_stream, probes
from .statistic import Statistic, Wanted
from .streams import Streams

Leave = Callable[[Edge | None, Moments], None]


@dataclass(frozen=True)
class Cutting:
    """What is measured of spaces on the way, and what is done to them there.

    ``decide(space, moments)`` gives the change of a space from its own moments. ``joined`` are the points that a shortcut
    of low rank leads to: what it leaves out is lost there. ``finish`` hears of each stage that will not be changed any more.
    """

    wanted: Wanted
    decide: Callable[[str, Moments], Change | None]
    joined: Container[str] = ()
    finish: Callable[[Edge], None] = lambda edge: None


@torch.no_grad()
def oneshot(
    parts: Stages,
    batches: list[Batch],
    wanted: Wanted,
    dtype: torch.dtype,
    progress: Progress = quiet,
    *,
    leave: Leave = lambda edge, moments: None,
    streams: Streams | None = None,
) -> None:
    """All moments from the model as it is, in one pass. The batches end before the final norm.

    ``leave`` gets the moments of a stage as the batches have left it, and at the end, with no stage, those of the last
    point of the stream. ``streams`` gets what leaves each stage, for ``sequential`` on the same batches.
    """
    layout = parts.layout
    entered: list[
        Tensor
    ] = []  # the stream where the block began, as long as it is compared with what leaves it
    for edge in progress(layout.edges, "calibrate", layout.depth):
        moments = Moments()
        stage = parts.stage(edge, dtype)
        passed: list[Left] = []
        compared = Statistic.COSINE in wanted.get(edge.entry, ())
        if compared and edge.source == edge.entry:
            entered = [batch.x for batch in batches]
        with probes(moments, layout, [edge.source, *layout.inside(edge)], stage, wanted) as probe:
            for batch in batches:
                probe.mask = batch.mask
                left = batch.left(batch.x, stage, edge)
                batch.x = left[0]
                probe.leave(left[1])
                if streams is not None:
                    passed.append(left)
        if streams is not None:
            streams.append(passed)
        if compared and edge.leaves:
            for x, batch in zip(entered, batches, strict=True):
                both = (real_tokens(s, batch.mask) for s in (x, batch.x))
                moments.compare((edge.entry, Statistic.COSINE), *both)
            entered = []
        del stage
        trim()
        leave(edge, moments.cpu())
    moments = Moments()
    _measure_stream(moments, parts, layout.points[-1], batches, wanted)
    leave(None, moments.cpu())


@torch.no_grad()
def sequential(
    parts: Stages,
    batches: list[Batch],
    dtype: torch.dtype,
    cutting: Cutting,
    *,
    follow: Following | None = None,
    progress: Progress = quiet,
) -> None:
    """Measure, decide and cut one space after the other, so that later bases see earlier cuts. Changes the model.

    A point of the stream is measured on what arrives there, its writers not yet cut; spaces inside a stage on the stage's
    cut input. A stage whose inner spaces are measured runs twice. With ``follow``, the dense model walks beside.
    """
    layout, wanted = parts.layout, cutting.wanted
    beside = None if follow is None else Beside(parts, batches, dtype, follow)
    basis: Change | None = None  # of the point before, in which the stream is now
    before: list[Tensor] = []  # the stream there, where it is still needed
    for i, edge in enumerate(progress(layout.edges, "calibrate and cut", layout.depth)):
        if beside is not None:
            beside.reach(i)
        parts.hold(edge)
        basis = _cut_stream(parts, edge.source, batches, cutting, basis, before)
        if i:
            cutting.finish(layout.edges[i - 1])
        before = [batch.x for batch in batches] if edge.target in cutting.joined else []
        inner = [n for n in layout.inside(edge) if n in wanted]
        if beside is not None:
            beside.refit_readers(edge, batches, basis if edge.source in wanted else None)
            beside.carry(edge, batches)
        if inner:
            moments = _measured(parts, edge, batches, {n: wanted[n] for n in inner}, dtype)
            parts.change(
                {n: c for n in inner if (c := cutting.decide(n, moments)) is not None}, [edge]
            )
        stage = parts.stage(edge, dtype)
        if beside is not None:
            beside.refit_writers(edge, stage, batches)
        else:
            for batch in batches:
                batch.x = batch.through(stage, edge)
    _cut_stream(parts, layout.points[-1], batches, cutting, basis, before)
    cutting.finish(layout.edges[-1])


def _measured(
    parts: Stages,
    edge: Edge,
    batches: list[Batch],
    wanted: Wanted,
    dtype: torch.dtype,
) -> Moments:
    """Moments of spaces inside a stage, as it stands now; no pass where nothing is asked for."""
    moments = Moments()
    if any(wanted.values()):
        stage = parts.stage(edge, dtype)
        with probes(moments, parts.layout, list(wanted), stage, wanted) as probe:
            for batch in batches:
                probe.mask = batch.mask
                probe.leave(batch.left(batch.x, stage, edge)[1])
    return moments.cpu()


def _cut_stream(
    parts: Stages,
    point: str,
    batches: list[Batch],
    cutting: Cutting,
    basis: Change | None,
    before: list[Tensor],
) -> Change | None:
    """Measure and change one point of the stream; ``basis`` is the change of the point before, ``before`` the stream
    there, if a shortcut of low rank leads from it."""
    if point not in cutting.wanted:
        return None
    moments = Moments()
    _measure_stream(moments, parts, point, batches, cutting.wanted)
    change = cutting.decide(point, moments.cpu())
    if change is not None:
        meeting = [e for e in parts.layout.edges if point in (e.source, e.target)]
        parts.change({point: change}, meeting)
        parts.change_ends({point: change})
        for batch in batches:
            wide = torch.promote_types(batch.x.dtype, torch.float32)
            batch.x = change.encode.contract(batch.x.to(wide)).to(batch.x.dtype)
        stage = next((parts.hold(e) for e in meeting if e.target == point), None)
        if (
            change is basis
        ):  # one basis on both sides of that stage: as when both change at once, no shortcut
            assert stage is not None
            stage.shortcut = None
        elif change.entry is not None and basis is not None:
            assert stage is not None
            whole = bridge(basis, change)
            for batch, x in zip(batches, before, strict=True):
                batch.x = batch.x + (stage.carry(x) - x @ whole.to(x))
    return change


def _measure_stream(
    moments: Moments, parts: Stages, point: str, batches: list[Batch], wanted: Wanted
) -> None:
    """What arrives at one point of the stream, and what the norm there makes of it."""
    statistics = wanted.get(point, frozenset())
    norm = norm_at(parts.model, parts.layout, point)
    for batch in batches if statistics else ():
        normed = norm(batch.x) if Statistic.NORMED in statistics else batch.x
        add_stream(moments, point, statistics, batch.x, normed, batch.mask)


def norm_at(model: PreTrainedModel, layout: Layout, point: str) -> nn.Module:
    """The norm that reads a point of the stream; one without a gain, which computes in any dtype."""
    found = {e.source: f"{e.stage}.norm" for e in layout.edges}.get(
        point, layout.architecture.final_norm
    )
    norm = model.get_submodule(found)
    return norm[0] if isinstance(norm, nn.Sequential) else norm
