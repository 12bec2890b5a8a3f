"""What Lightning trains: a student and its losses, the windows that it sees in their order, and its curve."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

from ..io.data import Tokens
from ..model.layout import Layout
from ..recipe.recover import Recover
from .nested import Member, sandwich
from .sharded import shard
from .teacher import Predictions, Streams, Teacher, tapped

HELD_OUT = "held_out_loss"


def of_member(share: str) -> str:
    """What the held-out loss of one nested member is called; ``HELD_OUT`` is the mean over all."""
    return f"{HELD_OUT}_{share}"


def next_token_loss(
    logits: Float[Tensor, "B T V"], ids: Int64[Tensor, "B T"], mask: Tensor
) -> Tensor:
    """The mean cross-entropy of the next real token, in nats."""
    logits = logits[:, :-1].float()
    picked = logits.gather(-1, ids[:, 1:, None])[..., 0] - logits.logsumexp(-1)
    return -_mean(picked, mask[:, 1:] & mask[:, :-1])


def kl_loss(
    logits: Float[Tensor, "B T V"],
    top: Int64[Tensor, "B T k"],
    logp: Float[Tensor, "B T k"],
    mask: Tensor,
) -> Tensor:
    """KL from the dense model's predictions, in nats, of its k likeliest tokens and of all others as one.

    A lower bound of that over all tokens, which it is where k is their number.
    """
    logits = logits.float()
    logq = logits.gather(-1, top.long()) - logits.logsumexp(-1, keepdim=True)
    kl = (logp.exp() * (logp - logq)).sum(-1)
    if top.shape[-1] < logits.shape[-1]:
        rest, theirs = (
            (1 - x.exp().sum(-1)).clamp_min(torch.finfo(x.dtype).eps) for x in (logp, logq)
        )
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
    """A student under a weighted sum of losses: AdamW, a rise and a cosine. With narrower members, the mean over those
    that a step trains; ``names`` are the shares of all, the student's first.

    Checkpoints hold what is trained and no more. The teacher is not a part of the module, so that no optimizer,
    checkpoint or process group knows of it.
    """

    strict_loading = False

    def __init__(
        self,
        student: PreTrainedModel,
        layout: Layout,
        options: Recover,
        teacher: Teacher | None,
        seed: int,
        names: Sequence[str] = (),
        narrower: Sequence[Member] = (),
    ) -> None:
        super().__init__()
        self.names, self.members = list(names), nn.ModuleList(narrower)
        self.student, self.layout, self.options, self.seed = student, layout, options, seed
        self.teachers = [] if teacher is None else [teacher]
        self.clock, self.begun = 0.0, 0

    def configure_model(self) -> None:
        """Leave each process its part of every block's weights, where the strategy shares them out."""
        if self.device_mesh is not None:
            shard(self.student, self.layout, self.device_mesh)

    def setup(self, stage: str) -> None:
        self.student.train()
        self.members.train()
        for teacher in self.teachers:
            teacher.model.to(self.device)  # type: ignore[arg-type]

    def configure_optimizers(self) -> Any:
        trained = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {
                "params": [p for p in trained if p.ndim > 1],
                "weight_decay": self.options.weight_decay,
            },
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
        torch.manual_seed(self.seed + index)  # so that a resumed run drops the same
        goal = self.teachers[0].streams(ids, _padding(mask)) if weights.hidden else {}
        drawn = sandwich(1 + len(self.members), self.seed + index // self.options.accumulate)
        each = [self._losses(batch, goal, n) for n in drawn]
        parts = {name: torch.stack([found[name] for found in each]).mean() for name in each[0]}
        loss = torch.stack([getattr(weights, name) * value for name, value in parts.items()]).sum()
        self.log("loss", loss.detach(), prog_bar=True)
        self.log_dict({n: v.detach() for n, v in parts.items()})
        return loss

    def _losses(self, batch: Mapping[str, Tensor], goal: Streams, member: int) -> dict[str, Tensor]:
        """The losses of the student (member 0), or of a narrower member, whose stream is the first part of it."""
        ids, mask, weights = batch["ids"], batch["mask"], self.options.loss
        model, layout = self.student, self.layout
        if member:
            narrower = self.members[member - 1]
            assert isinstance(narrower, Member)
            model, layout = narrower.twin, narrower.layout
        with tapped(model, layout) as found:
            logits = self(ids, mask, member)
        parts: dict[str, Tensor] = {}
        if weights.next_token:
            parts["next_token"] = next_token_loss(logits, ids, mask)
        if weights.kl:
            parts["kl"] = kl_loss(logits, batch["top"], batch["logp"], mask)
        if weights.hidden:
            near = {point: y[..., : found[point].shape[-1]] for point, y in goal.items()}
            parts["hidden"] = hidden_loss(found, near, mask)
        return parts

    def forward(self, ids: Tensor, mask: Tensor, member: int = 0) -> Tensor:
        inputs = {"input_ids": ids, "attention_mask": _padding(mask), "use_cache": False}
        if member:
            return self.members[member - 1](self.student, **inputs).logits
        return self.student(**inputs).logits

    def validation_step(self, batch: Mapping[str, Tensor], index: int) -> None:
        """Held-out losses as `evaluate` measures them: not in the lower precision that training may multiply in."""
        ids, mask = batch["ids"], batch["mask"]
        with torch.autocast(self.device.type, enabled=False):
            losses = [
                next_token_loss(self(ids, mask, n), ids, mask) for n in range(1 + len(self.members))
            ]
        self.log(
            HELD_OUT, torch.stack(losses).mean(), batch_size=len(ids), sync_dist=True, prog_bar=True
        )
        for name, loss in zip(self.names, losses, strict=bool(self.names)):
            self.log(of_member(name), loss, batch_size=len(ids), sync_dist=True)

    def on_train_start(self) -> None:
        self.clock, self.begun = time.perf_counter(), self.trainer.global_step

    def on_train_batch_end(self, outputs: Any, batch: Mapping[str, Tensor], index: int) -> None:
        done = (index + 1) * batch["ids"].numel() * self.trainer.world_size
        before = (
            self.begun * self.options.accumulate * batch["ids"].numel() * self.trainer.world_size
        )
        self.log(
            "tokens_per_second", (done - before) / (time.perf_counter() - self.clock), prog_bar=True
        )
        self.log("learning_rate", self.trainer.optimizers[0].param_groups[0]["lr"])
        if index + 1 == self.trainer.num_training_batches:
            self.trainer.should_stop = (
                True  # so that the last step is measured, wherever checks fall
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        checkpoint["state_dict"] = {
            n: t for n, t in checkpoint["state_dict"].items() if n in trained
        }


class Curve(Callback):
    """The held-out loss at every check and the seconds up to the last one, kept in checkpoints, so that those of a resumed
    run are whole."""

    def __init__(self) -> None:
        self.points: list[dict[str, float]] = []
        self.seconds = self.clock = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.clock = time.perf_counter() - self.seconds

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:  # before the first step, which is measured already
            return
        self.seconds = time.perf_counter() - self.clock
        found = {n: v.item() for n, v in trainer.callback_metrics.items() if n.startswith(HELD_OUT)}
        self.points.append({"step": trainer.global_step, **found})

    def state_dict(self) -> dict[str, Any]:
        return {"points": list(self.points), "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.points, self.seconds = list(state_dict["points"]), state_dict["seconds"]


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
        order = Order(
            len(self.train),
            self.options.batch,
            self.steps * each,
            self.seed,
            trainer.global_rank,
            trainer.world_size,
            start=self.begun * each,
        )
        return DataLoader(self.train, batch_sampler=order)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader:  # type: ignore[type-arg]
        return DataLoader(self.held, batch_size=self.options.batch)


def trained(model: nn.Module) -> int:
    """How many numbers are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
