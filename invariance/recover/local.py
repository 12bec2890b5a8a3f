"""Stages trained one by one on the block walk: each towards the dense stream behind it, from what reaches it now."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..calibrate.batch import Batch
from ..calibrate.enter import enter
from ..core.progress import Progress
from ..io.data import Tokens
from ..model.axes import Edge
from ..model.layout import Layout
from ..model.modules import Stage
from ..model.working import Whole
from ..recipe.recover import Recover
from .module import distance
from .teacher import Teacher


def reconstruct(
    student: PreTrainedModel,
    teacher: Teacher,
    layout: Layout,
    tokens: Tokens,
    options: Recover,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Train every stage that has weights to train, in order; the dense model walks beside.

    A stage takes the stream as the stages before it leave it, already trained, and is trained towards the dense stream
    behind it in the student's basis: ‖x − y‖²/‖y‖² of a token, the mean over tokens. Of each stage the result says
    what that was before its training and after it.
    """
    local = options.local
    assert local is not None
    some = Tokens(tokens.ids[: local.sequences], tokens.mask[: local.sequences])
    batches, goals = (
        enter(Whole(model, lay), some.batches(options.batch), torch.float32)
        for model, lay in ((student, layout), (teacher.model, teacher.layout))
    )
    stages: list[dict[str, Any]] = []
    behind = iter(teacher.layout.edges)
    for edge in progress(layout.edges, "train stages", layout.depth):
        with torch.no_grad():
            for theirs in behind:  # a student that lost blocks is caught up with
                stage = teacher.model.get_submodule(theirs.stage)
                assert isinstance(stage, Stage)
                for goal in goals:
                    goal.x = goal.through(stage, theirs)
                if theirs.target == teacher.basis.points[edge.target]:
                    break
        stage = student.get_submodule(edge.stage)
        assert isinstance(stage, Stage)
        weights = [p for p in stage.parameters() if p.requires_grad]
        targets = [teacher.mapped(goal.x, edge.target) for goal in goals]
        if weights:
            before = _off(batches, targets, stage, edge)
            _train(stage, edge, weights, batches, targets, options.rate, local.epochs)
            after = _off(batches, targets, stage, edge)
            stages.append({"stage": edge.stage, "before": before, "after": after})
        with torch.no_grad():
            for batch in batches:
                batch.x = batch.through(stage, edge)
    return stages


def _train(
    stage: Stage,
    edge: Edge,
    weights: list[nn.Parameter],
    batches: list[Batch],
    targets: list[Tensor],
    rate: float,
    epochs: int,
) -> None:
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
    for _ in range(epochs):
        for batch, target in zip(batches, targets, strict=True):
            optimizer.zero_grad()
            _loss(batch.through(stage, edge), target, batch.mask).backward()
            optimizer.step()


@torch.no_grad()
def _off(batches: list[Batch], targets: list[Tensor], stage: Stage, edge: Edge) -> float:
    """How far streams are from their targets behind a stage, the mean over batches."""
    pairs = zip(batches, targets, strict=True)
    losses = [
        _loss(batch.through(stage, edge), target, batch.mask).item() for batch, target in pairs
    ]
    return sum(losses) / len(losses)


def _loss(x: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    off = distance(x, target)
    return off.mean() if mask is None else off[mask].mean()
