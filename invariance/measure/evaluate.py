"""What models are worth: every evaluation of a recipe, prepared before anything is computed, then measured."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any, ClassVar

import torch
from transformers import PretrainedConfig, PreTrainedModel

from ..core.errors import InputError
from ..core.progress import Progress, quiet
from ..io.data import Amount, Making, Tokens, load_tokens
from ..io.memo import Memo
from ..io.source import live
from ..io.sources import sources
from ..model.families import check_positions, declared, positions
from ..recipe import evaluate as parts
from .losses import Each, Mean, check_windows, divergence, perplexity, scored, token_losses
from .sourced import Model, Sourced, whole
from .texts import texts

__all__ = ["Evaluation", "measure", "peak_memory", "perplexity", "prepare", "sample", "unasked"]

Models = Mapping[str, Model]  # by side; the others are compared with the first


class Evaluation(ABC):
    """One entry of `evaluate`, with all that it needs but models."""

    kind: ClassVar[str]

    @abstractmethod
    def measure(self, models: Models, progress: Progress, memo: Memo | None = None) -> Any:
        """What the report's section ``kind`` gets: items of a mapping or of a list. ``memo`` is of the first model."""


@dataclass(frozen=True, eq=False)
class Perplexity(Evaluation):
    part: parts.Perplexity
    tokens: Tokens
    kind = "perplexity"

    def measure(
        self, models: Models, progress: Progress, memo: Memo | None = None
    ) -> dict[str, Any]:
        counted, losses = scored(self.tokens, self.part.stride), dict[str, Each]()
        for side, model in models.items():
            losses[side] = self.losses(model, side, progress, None if losses else memo)
        means = {side: Mean.over(found, counted) for side, found in losses.items()}
        reference, *others = losses
        extra = {side: Mean.over(losses[side] - losses[reference], counted) for side in others}
        window = self.tokens.ids.shape[1]
        found: dict[str, Any] = {side: mean.exp for side, mean in means.items()}
        found |= {
            "tokens": int(counted.sum()),
            "window": window,
            "stride": self.part.stride or window,
        }
        found["loss"] = {
            side: {"value": m.value, "standard_error": m.standard_error}
            for side, m in means.items()
        }
        found["extra_loss"] = {
            side: {"value": m.value, "standard_error": m.standard_error}
            for side, m in extra.items()
        }
        return {self.part.label: found}

    def losses(self, model: Model, side: str, progress: Progress, memo: Memo | None) -> Each:
        """The losses of every token; those of a memo's model are computed once."""
        what = f"perplexity of {self.part.label}, {side}"
        make = partial(token_losses, model, self.tokens, self.part.batch, progress, what)
        if memo is None:
            return make()
        key = (
            "losses",
            memo.weights(model.source if isinstance(model, Sourced) else live(model)),
            model.config.to_json_string(use_diff=False),
            str(model.dtype),
            torch.device(model.device).type,
            self.tokens.digest(),
            str(self.part.batch),
            version("transformers"),
        )
        return memo.kept(key, make)


@dataclass(frozen=True, eq=False)
class Divergence(Evaluation):
    part: parts.Divergence
    tokens: Tokens
    kind = "divergence"

    def measure(
        self, models: Models, progress: Progress, memo: Memo | None = None
    ) -> dict[str, Any]:
        (reference, dense), *others = models.items()
        found = {}
        for side, model in others:
            what = f"divergence on {self.part.label}, {side}"
            found[side] = divergence(
                dense, model, self.tokens, self.part.batch, progress, what
            ).to_dict()
        return {self.part.label: {"reference": reference, **found}}


@dataclass(frozen=True, eq=False)
class Tasks(Evaluation):
    part: parts.Tasks
    tasks: Sequence[Any]
    tokenizer: Any
    kind = "tasks"

    def measure(self, models: Models, progress: Progress, memo: Memo | None = None) -> list[Any]:
        from . import tasks

        found = {
            side: tasks.scores(whole(model), self.tokenizer, self.tasks, self.part)
            for side, model in progress(
                list(models.items()), f"tasks {self.part.label}", len(models)
            )
        }
        return tasks.rows(found)


@dataclass(frozen=True, eq=False)
class Samples(Evaluation):
    part: parts.Samples
    tokenizer: Any
    kind = "samples"

    def measure(self, models: Models, progress: Progress, memo: Memo | None = None) -> list[Any]:
        rows: list[dict[str, str]] = [{"prompt": p} for p in self.part.prompts]
        for side, model in progress(list(models.items()), "samples", len(models)):
            loaded = whole(model)  # one at a time
            for row in rows:
                row[side] = sample(loaded, self.tokenizer, row["prompt"], self.part.tokens)
            del loaded
        return rows


def prepare_each(
    part: Any,
    kind: str,
    config: PretrainedConfig,
    tokenizer: Any,
    where: str,
    making: Making = Making(),
) -> list[Evaluation]:
    """An entry with its data read and its tasks found; of packaged:texts one for each text. Raises InputError."""
    each = part.each() if isinstance(part, parts.HeldOut) else (part,)
    return [prepare(one, kind, config, tokenizer, where, making) for one in each]


def prepare(
    part: Any,
    kind: str,
    config: PretrainedConfig,
    tokenizer: Any,
    where: str,
    making: Making = Making(),
) -> Evaluation:
    """An entry with its data read and its tasks found. Raises InputError."""
    text = config.get_text_config()
    if isinstance(part, parts.HeldOut):
        overlap = part.stride if isinstance(part, parts.Perplexity) else None
        found = load_tokens(
            part.data,
            tokenizer,
            vocab_size=text.vocab_size,
            split=part.split,
            amount=Amount(part.sequences, part.tokens, overlap),
            where=where,
            making=making,
        )
        _check_room(text, found.ids.shape[1], where)
        check_windows(found, where)
        if isinstance(part, parts.Divergence):
            return Divergence(part, found)
        assert isinstance(part, parts.Perplexity)
        return Perplexity(part, found)
    if tokenizer is None:
        raise InputError(
            f"{where}: {kind} are text, and the model comes without a tokenizer. Save the tokenizer beside the model."
        )
    if isinstance(part, parts.Samples):
        longest = max(prompt_tokens(tokenizer, prompt) for prompt in part.prompts)
        _check_room(text, longest + part.tokens, where)
        return Samples(part, tokenizer)
    from . import tasks

    return Tasks(part, tasks.load(part, where), tokenizer)


def _check_room(config: PretrainedConfig, tokens: int, where: str) -> None:
    """Raises InputError for sequences that are longer than the positions of a model whose family is known."""
    if declared(config):
        check_positions(config, tokens, where)


def unasked(config: PretrainedConfig, tokenizer: Any) -> Samples | None:
    """One text, as long as the model's positions allow; None where the prompt leaves no room."""
    part = parts.Samples(prompts=parts.PROMPTS[:1])
    limit = positions(config)
    room = part.tokens if limit is None else limit - prompt_tokens(tokenizer, *part.prompts)
    clipped = part.model_copy(update={"tokens": min(part.tokens, room)})
    return Samples(clipped, tokenizer) if room > 0 else None


def prompt_tokens(tokenizer: Any, prompt: str) -> int:
    """How many tokens a prompt has."""
    return len(tokenizer(prompt).input_ids)


def measure(
    evaluations: Iterable[Evaluation],
    models: Models,
    progress: Progress = quiet,
    memo: Memo | None = None,
    calibrated: Collection[str] | None = None,
) -> dict[str, Any]:
    """All of them, by section; the models are compared with the first, whose ``memo`` it may be. ``calibrated`` are the
    data on which the others were calibrated, where that is known."""
    evaluations = list(evaluations)
    report: dict[str, Any] = {"perplexity": {}, "divergence": {}, "tasks": [], "samples": []}
    for evaluation in evaluations:
        found = evaluation.measure(models, progress, memo)
        if isinstance(found, list):
            report[evaluation.kind] += found
        else:
            report[evaluation.kind] |= found
    measured = [
        (e.part.label, [s.data for s in sources(e.part.data)])
        for e in evaluations
        if isinstance(e, Perplexity)
    ]
    report["texts"] = texts(report["perplexity"], measured, calibrated)
    if report["tasks"]:  # of several entries, which each say what is significant of their own
        from . import tasks

        tasks.mark([d for row in report["tasks"] for d in row["difference"].values()])
    return report


def peak_memory() -> int | None:
    """The most bytes that the process held; None where the system does not say."""
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@torch.no_grad()
def sample(model: PreTrainedModel, tokenizer: Any, prompt: str, tokens: int = 40) -> str:
    """The greedy continuation of a prompt."""
    encoded = tokenizer(prompt, return_tensors="pt").to(model.device)
    out = model.generate(**encoded, max_new_tokens=tokens, do_sample=False)  # type: ignore[operator]
    return tokenizer.decode(out[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
