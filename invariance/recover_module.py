"""What Lightning trains: a student and its losses, the windows that it sees in their order, and its curve."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

from .data import Tokens
from .layout import Layout
from .recover_options import Recover
from .teacher import Predictions, Streams, Teacher, tapped

HELD_OUT = "held_out_loss"


def next_token_loss(logits: Float[Tensor, "B T V"], ids: Int64[Tensor, "B T"], mask: Tensor) -> Tensor:
    """The mean cross-entropy of the next real token, in nats."""
    logits = logits[:, :-1].float()
    picked = logits.gather(-1, ids[:, 1:, None])[..., 0] - logits.logsumexp(-1)
    return -_mean(picked, mask[:, 1:] & mask[:, :-1])


def kl_loss(
    logits: Float[Tensor, "B T V"], top: Int64[Tensor, "B T k"], logp: Float[Tensor, "B T k"], mask: Tensor
) -> Tensor:
    """KL from the dense model's predictions, in nats, of its k likeliest tokens and of all others as one.

    A lower bound of that over all tokens, which it is where k is their number.
    """
    logits = logits.float()
    logq = logits.gather(-1, top.long()) - logits.logsumexp(-1, keepdim=True)
    kl = (logp.exp() * (logp - logq)).sum(-1)
    if top.shape[-1] < logits.shape[-1]:
        rest, theirs = ((1 - x.exp().sum(-1)).clamp_min(torch.finfo(x.dtype).eps) for x in (logp, logq))
        kl = kl + rest * (rest.log() - theirs.log())
    return _mean(kl, mask)


def hidden_loss(found: Streams, goal: Streams, mask: Tensor) -> Tensor:
    """How far streams are from those they should be: ‖x − y‖²/‖y‖² of a token, the mean over tokens and points."""
    each = [_mean(distance(found[point], y), mask) for point, y in goal.items()]
    return torch.stack(each).mean()


def distance(x: Float[Tensor, "*B d"], y: Float[Tensor, "*B d"]) -> Float[Tensor, "*B"]:
    """‖x − y‖²/‖y‖² of each token."""
    x, y = x.float(), y.float()
    return (x - y).square().sum(-1) / y.square().sum(-1).clamp_min(torch.finfo(y.dtype).tiny)


def _mean(values: Float[Tensor, "B T"], mask: Tensor) -> Tensor:
    return values.mean() if bool(mask.all()) else values[mask].mean()


class Recovery(LightningModule):
    """A student under a weighted sum of losses: AdamW, a rise and a cosine.

    Checkpoints hold what is trained and no more. The teacher is not a part of the module, so that no optimizer,
    checkpoint or process group knows of it.
    """

    strict_loading = False

    def __init__(
        self, student: PreTrainedModel, layout: Layout, options: Recover, teacher: Teacher | None, seed: int
    ) -> None:
        super().__init__()
        self.student, self.layout, self.options, self.seed = student, layout, options, seed
        self.teachers = [] if teacher is None else [teacher]
        self.clock, self.begun = 0.0, 0

    def setup(self, stage: str) -> None:
        self.student.train()
        for teacher in self.teachers:
            teacher.model.to(self.device)  # type: ignore[arg-type]

    def configure_optimizers(self) -> Any:
        trained = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": self.options.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=self.options.rate)
        steps = int(self.trainer.estimated_stepping_batches)
        rise = round(self.options.warmup * steps)
        schedule = get_cosine_schedule_with_warmup(optimizer, rise, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: Mapping[str, Tensor], index: int) -> Tensor:
        ids, mask = batch["ids"], batch["mask"]
        weights = self.options.loss
        if self.options.adapters.dropout:
            torch.manual_seed(self.seed + index)  # so that a resumed run drops the same
        with tapped(self.student, self.layout) as found:
            logits = self(ids, mask)
        parts: dict[str, Tensor] = {}
        if weights.next_token:
            parts["next_token"] = next_token_loss(logits, ids, mask)
        if weights.kl:
            parts["kl"] = kl_loss(logits, batch["top"], batch["logp"], mask)
        if weights.hidden:
            parts["hidden"] = hidden_loss(found, self.teachers[0].streams(ids, _padding(mask)), mask)
        loss = torch.stack([getattr(weights, name) * value for name, value in parts.items()]).sum()
        self.log_dict({"loss": loss.detach(), **{n: v.detach() for n, v in parts.items()}}, prog_bar=False)
        return loss

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.student(input_ids=ids, attention_mask=_padding(mask), use_cache=False).logits

    def validation_step(self, batch: Mapping[str, Tensor], index: int) -> None:
        loss = next_token_loss(self(batch["ids"], batch["mask"]), batch["ids"], batch["mask"])
        self.log(HELD_OUT, loss, batch_size=len(batch["ids"]), sync_dist=True, prog_bar=True)

    def on_train_start(self) -> None:
        self.clock, self.begun = time.perf_counter(), self.trainer.global_step

    def on_train_batch_end(self, outputs: Any, batch: Mapping[str, Tensor], index: int) -> None:
        done = (index + 1) * batch["ids"].numel() * self.trainer.world_size
        before = self.begun * self.options.accumulate * batch["ids"].numel() * self.trainer.world_size
        self.log("tokens_per_second", (done - before) / (time.perf_counter() - self.clock), prog_bar=True)
        self.log("learning_rate", self.trainer.optimizers[0].param_groups[0]["lr"])
        if index + 1 == self.trainer.num_training_batches:
            self.trainer.should_stop = True  # so that the last step is measured, wherever checks fall

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        checkpoint["state_dict"] = {n: t for n, t in checkpoint["state_dict"].items() if n in trained}


class Curve(Callback):
    """The held-out loss at every check, kept in checkpoints, so that a resumed run's curve is whole."""

    def __init__(self) -> None:
        self.points: list[dict[str, float]] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loss = trainer.callback_metrics[HELD_OUT].item()
        self.points.append({"step": trainer.global_step, HELD_OUT: loss})

    def state_dict(self) -> dict[str, Any]:
        return {"points": list(self.points)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.points = list(state_dict["points"])


def _padding(mask: Tensor) -> Tensor | None:
    return None if bool(mask.all()) else mask.long()


@dataclass(frozen=True)
class Windows(Dataset):  # type: ignore[type-arg]
    """Windows of tokens, with what the dense model predicts there, if that is asked for."""

    tokens: Tokens
    predictions: Predictions | None = None

    def __len__(self) -> int:
        return len(self.tokens.ids)

    def __getitem__(self, n: int) -> dict[str, Tensor]:
        known = {} if self.predictions is None else self.predictions.of(n)
        return {"ids": self.tokens.ids[n], "mask": self.tokens.mask[n], **known}


@dataclass(frozen=True)
class Order:
    """Which windows each batch holds: all of them in a random order, then all again in another.

    A batch of every process is drawn before the next one of any, so that n processes see in one step what one sees in
    n batches. ``start`` batches are passed over: those before the checkpoint that training resumes from.
    """

    windows: int
    batch: int
    batches: int
    seed: int
    rank: int = 0
    world: int = 1
    start: int = 0

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        shuffled: dict[int, list[int]] = {}
        for n in range(self.start, self.batches):
            first = (n * self.world + self.rank) * self.batch
            places = [divmod(i, self.windows) for i in range(first, first + self.batch)]
            for epoch in {e for e, _ in places} - shuffled.keys():
                g = torch.Generator().manual_seed(self.seed + epoch)
                shuffled[epoch] = torch.randperm(self.windows, generator=g).tolist()
            yield [shuffled[epoch][place] for epoch, place in places]


class Text(LightningDataModule):
    """The windows to train on, from step ``begun``, and those that are held out."""

    def __init__(
        self, train: Windows, held: Windows, options: Recover, steps: int, seed: int, begun: int
    ) -> None:
        super().__init__()
        self.train, self.held, self.options = train, held, options
        self.steps, self.seed, self.begun = steps, seed, begun

    def train_dataloader(self) -> DataLoader:  # type: ignore[type-arg]
        trainer, each = self.trainer, self.options.accumulate
        assert trainer is not None  # whose own count of steps is not restored yet
        order = Order(len(self.train), self.options.batch, self.steps * each, self.seed, trainer.global_rank,
                      trainer.world_size, start=self.begun * each)  # fmt: skip
        return DataLoader(self.train, batch_sampler=order)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader:  # type: ignore[type-arg]
        return DataLoader(self.held, batch_size=self.options.batch)


def trained(model: nn.Module) -> int:
    """How many numbers are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
