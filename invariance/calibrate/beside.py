"""The dense model walks beside a walk that cuts, and what is cut is refit to follow its stream."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass

import torch

from ..core.change import Change
from ..model.axes import Edge
from ..model.modules import Stage
from ..model.working import Stages
from .batch import Batch
from .refit import Follower, refit_readers
from .streams import Streams


@dataclass(frozen=True)
class Following:
    """How the cut model is made to follow the dense one, which walks beside (refit.py).

    After each stage is cut, what writes the stream is refit to bring it back to the dense one, and, with ``readers``, before
    it is cut, what reads the stream to make up for what it has become. ``stay`` names the stages that keep a branch; the
    last one before some that go is refit to the dense stream behind all those, whose work it takes over. Writers with a norm
    behind them are refit to what they give in the dense model. ``streams``, which are used up, spare the dense model its walk.
    """

    readers: bool = True
    stay: Container[str] | None = None
    streams: Streams | None = None


class Beside:
    """The dense model's stream, carried on as the walk goes, stage by stage."""

    def __init__(
        self, parts: Stages, batches: list[Batch], dtype: torch.dtype, how: Following
    ) -> None:
        self.parts, self.dtype, self.how = parts, dtype, how
        self.dense = [batch.x for batch in batches]
        self.goals = self.dense  # what the writers of a stage are refit to
        self.reached = 0  # how many stages the dense stream has passed
        self.ahead: list[tuple[Edge, Stage]] = []  # those that it passes next, not cut yet

    def reach(self, i: int) -> None:
        """Take hold of the stages that the dense stream passes at edge i, before any of them is cut."""
        edges = self.parts.layout.edges
        first = max(self.reached, i)
        taken = edges[first : _behind(edges, i, self.how.stay)]
        self.reached = first + len(taken)
        self.ahead = [(e, self.parts.stage(e, self.dtype)) for e in taken]

    def refit_readers(self, edge: Edge, batches: list[Batch], basis: Change | None) -> None:
        """Refit what reads the stream there, where that is asked for; ``basis`` is what the stream was changed to."""
        if self.ahead and self.how.readers:
            model, layout = self.parts.model, self.parts.layout
            uncut = self.ahead[0][1]
            refit_readers(model, layout, edge, batches, self.dense, uncut, basis)

    def carry(self, edge: Edge, batches: list[Batch]) -> None:
        """Carry the dense stream on."""
        streams = self.how.streams
        for e, stage in self.ahead:
            passed = (
                streams.popleft()
                if streams
                else [batch.left(x, stage, e) for batch, x in zip(batches, self.dense, strict=True)]
            )
            self.dense = [behind for behind, _ in passed]
            if e is edge:
                self.goals = [given for _, given in passed]
        if not edge.post:
            self.goals = self.dense

    def refit_writers(self, edge: Edge, stage: Stage, batches: list[Batch]) -> None:
        """Refit the writers of one stage to their goals; carry the batches behind it."""
        follower = Follower(edge, stage)
        for batch, target in zip(batches, self.goals, strict=True):
            follower.add(batch, target)
        follower.refit(self.parts.model, batches)


def _behind(edges: Sequence[Edge], i: int, stay: Container[str] | None) -> int:
    """The next stage after i that stays, by its number."""
    following = range(i + 1, len(edges))
    return next((n for n in following if stay is None or edges[n].stage in stay), len(edges))
