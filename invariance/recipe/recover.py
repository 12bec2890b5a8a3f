"""What may be asked of recovery: the recipe's key ``recover``, and the options of the command of that name."""

from __future__ import annotations

import inspect
import os
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from ..core.errors import did_you_mean
from ..core.parts import Count, Part, Positive, Several, Share, Weight, Word
from ..io.data import DEFAULT_TOKENS, Tokens
from ..io.sources import Data, are_arrays
from .complaints import Problem
from .yaml_text import show

OWNED = {
    "callbacks": "they are objects, which no recipe can hold",
    "enable_checkpointing": "the best weights, and those to resume from, are kept in checkpoints",
    "fast_dev_run": "`recover.tokens` says how long",
    "limit_train_batches": "`recover.epochs` or `recover.tokens` says how long",
    "limit_val_batches": "`recover.held_out` says how many windows are measured",
    "logger": "`recover.logger` names it",
    "max_epochs": "`recover.epochs` or `recover.tokens` says how long",
    "max_steps": "`recover.epochs` or `recover.tokens` says how long",
    "overfit_batches": "`train.sequences` says on how many windows",
    "min_epochs": "`recover.epochs` or `recover.tokens` says how long",
    "min_steps": "`recover.epochs` or `recover.tokens` says how long",
    "plugins": "they are objects, which no recipe can hold",
    "use_distributed_sampler": "windows are shared out so that n processes see what one sees in n batches",
    "val_check_interval": "`recover.checks` says how often",
    "check_val_every_n_epoch": "`recover.checks` says how often",
}
PROFILERS = ("simple", "advanced", "pytorch")
RATES = {"lora": 3e-4, "full": 3e-5, "norms": 1e-3}


Rank = Annotated[int, Field(ge=1, le=2**16)]
Rate = Annotated[float, Field(gt=0, le=1e30, allow_inf_nan=False)]


class Lora(Part):
    """Low-rank adapters on every matrix of the blocks, merged afterwards."""

    rank: Rank = 16  # the rank of each adapter
    alpha: Positive = 32.0  # adapters count alpha/rank
    dropout: Share = 0.0  # the share of an adapter's inputs that are dropped in training


class Loss(Part):
    """How much each loss counts; 0 leaves it out."""

    next_token: Weight = 1.0  # the cross-entropy of the text
    kl: Weight = (
        0.0  # KL from the dense model's predictions, its `top` tokens and the rest of its mass
    )
    hidden: Weight = (
        0.0  # the stream before each block against the dense one, mapped into this model's basis
    )

    @model_validator(mode="after")
    def _one_at_least(self) -> Loss:
        if not (self.next_token or self.kl or self.hidden):
            raise Problem("nothing is trained for. Give `next_token`, `kl` or `hidden` a weight")
        return self


class Text(Part):
    """The text to train on."""

    data: Data  # a hub dataset, a local file, packaged:NAME, self, token ids in an .npy, or a list of them
    sequences: Count | None = None  # how many windows; null for as many as are asked for
    tokens: Several | None = (
        None  # how many tokens a window has; null for what the data or the model has
    )
    split: Word = "train"  # which split of the data


class Local(Part):
    """Stages trained one by one, each towards the dense stream behind it, before all are trained together."""

    epochs: Count = 1  # how often each stage sees the windows
    sequences: Count = 32  # how many windows, from the start

    def tokens(self, train: Tokens) -> int:
        """How many tokens each stage is trained on."""
        return self.epochs * train.ids[: self.sequences].numel()


class Recover(Part):
    """Training after slicing, on the text or towards the dense model."""

    weights: Literal["lora", "full", "norms"] = (
        "lora"  # adapters, everything, or gains and shortcuts alone
    )
    lora: Lora | None = None  # the adapters, as in {rank: 16}
    loss: Loss = Loss()  # what is minimised, as in {next_token: 1.0, kl: 1.0}
    train: Text | None = (
        None  # the text to train on, as in {data: wikitext2}; null for that of `calibrate`
    )
    held_out: Count = 16  # how many windows, the last ones, measure and are not trained on
    epochs: Count | None = None  # how often each window is seen; 1 where no `tokens` are given
    tokens: Count | None = None  # how many tokens to train on at most, instead of `epochs`
    batch: Count = 4  # how many windows pass at a time, in each process
    learning_rate: Rate | None = (
        None  # the highest; null for 3e-4 (lora), 3e-5 (full), 1e-3 (norms)
    )
    warmup: Share = 0.05  # the share of steps in which it rises; then it falls, as a cosine
    weight_decay: Weight = 0.01  # of matrices, by AdamW
    checks: Count = 10  # how often held-out windows are measured and a checkpoint is written
    patience: Count = 3  # how many such checks without gain end the training
    top: Count = 32  # how many of the dense model's most likely tokens are kept for `kl`
    checkpointing: bool = (
        False  # whether activations are computed again instead of kept, true or false
    )
    local: Local | None = None  # stages first, one by one, as in {epochs: 1}
    nested: bool = (
        False  # whether the members of a nested family are trained together, true or false
    )
    logger: Literal["csv", "tensorboard", "wandb", "mlflow"] = "csv"  # who keeps the curves
    trainer: dict[str, Any] = Field(
        default_factory=dict
    )  # of Lightning's Trainer, as in {devices: 2}

    @field_validator("trainer")
    @classmethod
    def _known(cls, value: dict[str, Any]) -> dict[str, Any]:
        for key, given in value.items():
            if key in OWNED:
                raise Problem(f"'{key}' is not set here: {OWNED[key]}. Remove it", key)
            if key not in (known := trainer_options()):
                raise Problem(
                    f"Lightning's Trainer has no option '{key}'{did_you_mean(key, known)}", key
                )
            if key == "accumulate_grad_batches" and not (type(given) is int and given > 0):
                raise Problem(f"got {show(given)}, but it should be a whole number from 1", key)
            if key == "num_nodes" and given != 1 and not _is_started_on_several():
                raise Problem(
                    "machines are counted by what starts a process on each, and none has: it would wait for the others "
                    "for ever. Start it by torchrun or Slurm on all of them, or remove it",
                    key,
                )
            if key == "profiler" and given not in (None, *PROFILERS):
                raise Problem(
                    f"got {show(given)}, but it should be one of {', '.join(PROFILERS)}", key
                )
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Recover:
        if self.lora is not None and self.weights != "lora":
            raise Problem(
                f"`weights: {self.weights}` trains no adapters. Remove one of the two", "lora"
            )
        if self.epochs and self.tokens:
            raise Problem("`epochs` says already how long. Keep one of the two", "tokens")
        if self.nested:
            self._check_nested()
        return self

    def _check_nested(self) -> None:
        strategy = str(self.trainer.get("strategy")).lower()
        why = {
            "local": "stages are trained one by one at the widest member's width alone"
            if self.local
            else "",
            "checkpointing": "members run on parts of weights, which are gone when activations are computed again"
            if self.checkpointing
            else "",
            "trainer": f"members run on parts of whole weights, and '{strategy}' gives each process a part of them"
            if strategy.startswith(("fsdp", "deepspeed"))
            else "",
        }
        for key, reason in why.items():
            if reason:
                raise Problem(f"`nested: true` goes without: {reason}. Remove one of the two", key)

    def text(self, otherwise: Any) -> Text:
        """The windows to read; by default more of ``otherwise``, a recipe's part that names data. A budget of tokens asks
        for as many as it takes, of text; a file of token ids has what it has, and is seen again."""
        source = self.train or otherwise
        sequences = source.sequences
        if self.tokens is not None and (self.train is None or sequences is None):
            length = source.tokens or DEFAULT_TOKENS
            sequences = (
                None if are_arrays(source.data) else -(-self.tokens // length) + self.held_out
            )
        return Text(data=source.data, sequences=sequences, tokens=source.tokens, split=source.split)

    @property
    def adapters(self) -> Lora:
        return self.lora or Lora()

    @property
    def rate(self) -> float:
        return self.learning_rate or RATES[self.weights]

    @property
    def accumulate(self) -> int:
        """How many batches make one step."""
        return int(self.trainer.get("accumulate_grad_batches", 1))

    @property
    def needs_streams(self) -> bool:
        """Whether the dense model's stream is asked for."""
        return bool(self.loss.hidden or self.local)

    @property
    def needs_teacher(self) -> bool:
        return bool(self.loss.kl) or self.needs_streams


def _is_started_on_several() -> bool:
    """Whether torchrun or Slurm has started this process beside others."""
    return any(
        os.environ.get(name, "1") not in ("", "1") for name in ("WORLD_SIZE", "SLURM_NTASKS")
    )


def trainer_options() -> list[str]:
    """The options of Lightning's Trainer that a recipe can set."""
    from lightning.pytorch import Trainer  # takes seconds, and most recipes set none

    return [
        name
        for name in inspect.signature(Trainer.__init__).parameters
        if name not in ("self", *OWNED)
    ]
