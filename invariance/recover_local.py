"""Stages trained one by one on the block walk: each towards the dense stream behind it, from what reaches it now."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .data import Tokens
from .layout import Edge, Layout
from .modules import Stage
from .recover_module import distance
from .recover_options import Recover
from .teacher import Teacher
from .walk import Batch, Progress, enter


def reconstruct(student: PreTrainedModel, teacher: Teacher, layout: Layout, tokens: Tokens, options: Recover,
                progress: Progress) -> list[dict[str, Any]]:  # fmt: skip
    """Train every stage that has weights to train, in order; the dense model walks beside.

    A stage takes the stream as the stages before it leave it, already trained, and is trained towards the dense stream
    behind it in the student's basis: ‖x − y‖²/‖y‖² of a token, the mean over tokens. Of each stage the result says
    what that was in the first pass and in the last.
    """
    local = options.local
    assert local is not None
    some = Tokens(tokens.ids[: local.sequences], tokens.mask[: local.sequences])
    batches, goals = (
        enter(model, lay, some.batches(options.batch), torch.float32)
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
            passes = _train(stage, edge, weights, batches, targets, options.rate, local.epochs)
            stages.append({"stage": edge.stage, "first": passes[0], "last": passes[-1]})
        with torch.no_grad():
            for batch in batches:
                batch.x = batch.through(stage, edge)
    return stages


def _train(stage: Stage, edge: Edge, weights: list[nn.Parameter], batches: list[Batch], targets: list[Tensor], rate: float,
           epochs: int) -> list[float]:  # fmt: skip
    """The mean loss of each pass over the batches."""
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
    passes = []
    for _ in range(epochs):
        total = 0.0
        for batch, target in zip(batches, targets, strict=True):
            off = distance(batch.through(stage, edge), target)
            loss = off.mean() if batch.mask is None else off[batch.mask].mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        passes.append(total / len(batches))
    return passes
