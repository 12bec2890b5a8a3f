"""Recovery: train what slicing left, under Lightning's Trainer, and put what was learned back into the model."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from transformers import PreTrainedModel

from ..compress.nested import Members
from ..core.cache import cache_dir
from ..core.errors import InputError, InvarianceError
from ..core.files import replacing
from ..core.progress import Progress, quiet
from ..io.basis_file import Basis
from ..io.data import Tokens
from ..measure.evaluate import perplexity
from ..measure.losses import scored
from ..model.copies import copy_in
from ..model.labels import label
from ..model.layout import Layout
from ..recipe.recover import Recover
from .adapt import adapt, settle
from .local import reconstruct
from .module import HELD_OUT, Recovery, Text, Windows, of_member, trained
from .nested import Member
from .resume import LOCAL, begin, read
from .teacher import Predictions, Teacher, predictions
from .trainer import BEST, LAST, check_logger, fit, make, still
from .training import Restructured, Training

FORMAT = "3"  # counts up when a checkpoint to resume from would be read otherwise


@dataclass(frozen=True)
class Recovered:
    """What training gave: the curves in ``logs``, and what the report says of it."""

    logs: Path
    report: dict[str, Any]


def recover(
    cut: Restructured,
    dense: PreTrainedModel | None,
    tokens: Tokens,
    training: Training,
    *,
    identity: Mapping[str, Any],
    progress: Progress = quiet,
) -> Recovered:
    """Train a restructured model, in place; in float32, whatever it is stored in.

    ``dense`` is what it was sliced from, where options ask for that. Its narrower members are trained with it where they
    do. ``identity`` says what the run depends on: a run of the same that was interrupted is resumed from its last check.

    Raises InputError, with nothing changed, for options that cannot be; InvarianceError where training diverges.
    """
    model, nested = cut.model, cut.nested or {}
    options, seed, where = training.options, training.seed, training.where
    train, held = split(tokens, options, where)
    work = begin(_work(tokens, training, cut.nested, identity), where)
    student = copy_in(torch.float32, model)
    layout = label(student)
    teacher = _teacher(student, layout, cut.basis, dense, options)
    names = _names(nested, options, where)
    narrower, before = _members(student, layout, names, nested, held, training, progress)
    adapt(student, layout, options, seed)
    count = trained(student)
    stages = _local(work / LOCAL, student, teacher, layout, train, options, progress)
    kept = _predictions(dense, train, options, progress)
    if options.checkpointing:
        _checkpoint(student)
    trainer = make(options, model.device, where, work, bar=progress is not quiet)
    steps, per_step = _steps(options, train, trainer, where)
    trainer.val_check_interval = math.ceil(steps / options.checks) * options.accumulate
    tutor = teacher if options.loss.hidden else None
    module = Recovery(student, layout, options, tutor, seed, names, narrower)
    text = Text(Windows(train, kept), Windows(held), options, steps, seed, begun=_step(work / LAST))
    if not _finished(work / LAST, steps):
        fit(trainer, module, text, work / LAST)
    end = _end(work / LAST, where)
    curve = [{"step": 0, **before}, *end["callbacks"]["Curve"]["points"]]
    chosen = _best(curve, where)
    if chosen["step"]:
        _take_over(model, layout, training, work / BEST)
    ran, gained = end["global_step"], partial(_gained, before, chosen)
    report = {
        "weights": options.weights,
        "trained_parameters": count,
        "steps": ran,
        "tokens": ran * per_step,
        "best_step": chosen["step"],
        "stopped_early": ran < steps,
        "held_out": gained(HELD_OUT) | {"tokens": int(scored(held).sum())},
        "members": {name: gained(of_member(name)) for name in names},
        "tokens_per_second": round(ran * per_step / end["callbacks"]["Curve"]["seconds"], 1),
        "curve": curve,
        "local": stages,
        "local_tokens": options.local.tokens(train) if stages and options.local else 0,
    }
    return Recovered(work / "logs", report)


def _predictions(
    dense: PreTrainedModel | None, train: Tokens, options: Recover, progress: Progress
) -> Predictions | None:
    """What the dense model says of the text, where a loss compares with it."""
    if dense is None or not options.loss.kl:
        return None
    return predictions(dense, train, options.top, options.batch, progress)


def _checkpoint(student: PreTrainedModel) -> None:
    """Compute activations again on the way back, which saves their memory."""
    with still():
        student.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )


def _take_over(model: PreTrainedModel, layout: Layout, training: Training, best: Path) -> None:
    """Give the model what its student had learned at the best check."""
    learned = copy_in(torch.float32, model)  # the student's own may lie in parts by now
    adapt(learned, layout, training.options, training.seed)
    put_back(learned, _weights(best))
    put_back(model, settle(learned, layout, training.options))


def _gained(
    before: Mapping[str, float], chosen: Mapping[str, float], loss: str
) -> dict[str, float]:
    """A held-out perplexity before training and at the check that is kept."""
    return {"before": math.exp(before[loss]), "after": math.exp(chosen[loss])}


def _work(
    tokens: Tokens, training: Training, nested: Members | None, identity: Mapping[str, Any]
) -> Path:
    """The folder in the cache that belongs to this run and no other, from which it is resumed."""
    keys = {
        "format": FORMAT,
        "options": training.options.model_dump(mode="json"),
        "tokens": tokens.digest(),
        "seed": training.seed,
        "nested": nested if training.options.nested else None,
        **identity,
    }
    return cache_dir(
        "recover", hashlib.sha256(json.dumps(keys, sort_keys=True).encode()).hexdigest()[:32]
    )


def _teacher(
    student: PreTrainedModel,
    layout: Layout,
    basis: Basis | None,
    dense: PreTrainedModel | None,
    options: Recover,
) -> Teacher | None:
    """The dense model's stream in the student's basis, where options ask for it."""
    if not options.needs_streams:
        return None
    assert dense is not None and basis is not None
    teacher = Teacher.of(dense, basis)
    teacher.check(student, layout)
    return teacher


def _members(
    student: PreTrainedModel,
    layout: Layout,
    names: list[str],
    nested: Members,
    held: Tokens,
    training: Training,
    progress: Progress,
) -> tuple[list[Member], dict[str, float]]:
    """The narrower members, ready for training, and held-out losses before it by the names that they have in it, of which
    the first is the mean."""

    options = training.options

    def loss(model: PreTrainedModel) -> float:
        return math.log(
            perplexity(model, held, options.batch, progress, "held-out perplexity before recovery")
        )

    losses, narrower = [loss(student)], list[Member]()
    for name in names[1:]:
        narrower.append(Member(student, layout, nested[name]))
        losses.append(loss(narrower[-1].twin))
        narrower[-1].adapt(
            options, training.seed
        )  # which lets its weights go before the next one is made
    return narrower, {
        HELD_OUT: sum(losses) / len(losses),
        **dict(zip(map(of_member, names), losses, strict=False)),
    }


def _names(nested: Members, options: Recover, where: str) -> list[str]:
    """The shares of the members that are trained together, the model's own first; none where it is trained alone."""
    if options.nested and not nested:
        raise InputError(
            f"{where}: `nested: true` trains the members of a nested family, and this model is one alone. Remove it, or "
            "give a checkpoint that a recipe with `nested` made."
        )
    return sorted(nested, key=float, reverse=True) if options.nested else []


def _best(curve: list[dict[str, float]], where: str) -> dict[str, float]:
    """The check with the least held-out loss; the first one is that before training."""
    finite = [point for point in curve if math.isfinite(point[HELD_OUT])]
    chosen = min(finite, key=lambda point: point[HELD_OUT], default=curve[0])
    if len(finite) < len(curve) and not chosen["step"]:
        raise InvarianceError(
            f"{where}: training diverged: the held-out loss is {curve[-1][HELD_OUT]} after step {curve[-1]['step']}, and it "
            "was never better than before. Lower `learning_rate`. Nothing is written."
        )
    return chosen


def _step(last: Path) -> int:
    """How many steps an interrupted run had made."""
    return int(read(last)["global_step"]) if last.is_file() else 0


def _finished(last: Path, steps: int) -> bool:
    """Whether an interrupted run had trained to its end, or until it was stopped early, and only its result is missing."""
    if not last.is_file():
        return False
    found = read(last)
    waits = [s for name, s in found["callbacks"].items() if name.startswith("EarlyStopping")]
    return found["global_step"] >= steps or any(s["wait_count"] >= s["patience"] for s in waits)


def _end(last: Path, where: str) -> dict[str, Any]:
    """What training had come to at its last check. Raises InvarianceError where there was none."""
    if not last.is_file():
        raise InvarianceError(
            f"{where}: training ended before its first check, so there is nothing to keep. Allow more `trainer.max_time`, or "
            "more `checks`. Nothing is written."
        )
    return read(last)


def _weights(best: Path) -> dict[str, Tensor]:
    """The student's weights at the best check; narrower members hold its weights, and none of their own."""
    own = "student."
    state = read(best)["state_dict"]
    return {name.removeprefix(own): value for name, value in state.items() if name.startswith(own)}


@torch.no_grad()
def put_back(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> None:
    """Give a model the weights that were trained in a copy of it, in the model's own dtype."""
    for name, value in weights.items():
        model.get_parameter(name).copy_(value)


def split(tokens: Tokens, options: Recover, where: str) -> tuple[Tokens, Tokens]:
    """The windows to train on, and the last ones, which are held out. Raises InputError where they are too few."""
    count, held = tokens.ids.shape[0], options.held_out
    if count <= held or tokens.ids.shape[1] < 2:
        raise InputError(
            f"{where}: {count} windows of {tokens.ids.shape[1]} tokens, of which `held_out: {held}` are not trained on. "
            f"Give more than {held} windows of 2 tokens or more, or hold out fewer."
        )
    n = count - held
    return Tokens(tokens.ids[:n], tokens.mask[:n]), Tokens(tokens.ids[n:], tokens.mask[n:])


def check(options: Recover, tokens: Tokens, device: torch.device, where: str) -> None:
    """Refuse what cannot be, before anything is computed. Raises InputError."""
    check_logger(options.logger, where)
    train, _ = split(tokens, options, where)
    trainer = make(options, device, where)
    _steps(options, train, trainer, where)
    strategy = str(options.trainer.get("strategy", "ddp"))
    alone = not (options.loss.next_token or options.loss.kl)
    if (
        alone
        and trainer.world_size > 1
        and strategy.startswith("ddp")
        and "find_unused" not in strategy
    ):
        raise InputError(
            f"{where}: the head learns nothing from `hidden` alone, and strategy '{strategy}' waits for the gradient of every "
            "weight. Add `next_token` or `kl`, or take `strategy: ddp_find_unused_parameters_true`."
        )


def _steps(options: Recover, train: Tokens, trainer: Trainer, where: str) -> tuple[int, int]:
    """How many steps there are, and how many tokens each of them takes."""
    each = options.batch * options.accumulate * trainer.world_size * train.ids.shape[1]
    budget = options.tokens or (options.epochs or 1) * train.ids.numel()
    if budget < each:
        raise InputError(
            f"{where}: {budget} tokens to train on, and one step takes {each} (batch {options.batch} × accumulation "
            f"{options.accumulate} × processes {trainer.world_size} × window {train.ids.shape[1]}). Train on more, or "
            "make steps smaller."
        )
    return budget // each, each


def _local(
    path: Path,
    student: PreTrainedModel,
    teacher: Teacher | None,
    layout: Layout,
    train: Tokens,
    options: Recover,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Train the stages one by one where options ask for it, or take over what an interrupted run had of that."""
    if teacher is None or options.local is None:
        return []
    if path.is_file():
        kept = read(path)
        student.load_state_dict(kept["state_dict"], strict=False)
        return list(kept["stages"])
    stages = reconstruct(student, teacher, layout, train, options, progress)
    state = {n: p.detach() for n, p in student.named_parameters() if p.requires_grad}
    with replacing(path) as temporary:
        torch.save({"state_dict": state, "stages": stages}, temporary)
    return stages
