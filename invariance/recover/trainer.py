"""Lightning's Trainer for recovery: our defaults, checkpoints and loggers, and a quiet run of it."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import (
    CSVLogger,
    Logger,
    MLFlowLogger,
    TensorBoardLogger,
    WandbLogger,
)
from lightning.pytorch.profilers import AdvancedProfiler, Profiler, PyTorchProfiler, SimpleProfiler

from ..core.errors import InputError
from ..recipe.recover import Recover
from . import sharded as recover_sharded
from .module import HELD_OUT, Curve, Recovery, Text

BEST, LAST = (
    "best.ckpt",
    "last.ckpt",
)  # the checkpoint with the least held-out loss, and the one to resume from
PACKAGES = {
    "csv": (),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
}  # any one of them does


def check_logger(name: str, where: str) -> None:
    """Raises InputError where no package that the logger needs is installed."""
    packages = PACKAGES[name]
    if packages and not any(map(importlib.util.find_spec, packages)):
        raise InputError(
            f"{where}: recover.logger: '{name}' needs the package {packages[0]}, which is not installed. Run "
            f"`pip install {packages[0]}`, or use `logger: csv`."
        )


def make(
    options: Recover, device: torch.device, where: str, work: Path | None = None, bar: bool = False
) -> Trainer:
    """Lightning's Trainer: our defaults, then what the recipe says. Without a folder it is there to be asked."""
    logger = None if work is None else _logger(options.logger, work / "logs")
    work = work or Path()
    callbacks: list[Callback] = [
        Curve(),
        EarlyStopping(HELD_OUT, patience=options.patience, check_on_train_epoch_end=False),
        ModelCheckpoint(
            work,
            Path(BEST).stem,
            HELD_OUT,
            mode="min",
            save_top_k=1,
            save_weights_only=True,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        ),
        ModelCheckpoint(
            work,
            Path(LAST).stem,
            save_top_k=1,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        ),
    ]
    if bar and options.trainer.get("enable_progress_bar", True):
        callbacks.append(RichProgressBar(console_kwargs={"stderr": True}))
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported()
    asked = (
        {
            "accelerator": "gpu" if device.type == "cuda" else "cpu",
            "devices": 1,
            "precision": "bf16-mixed" if fast else "32-true",
            "gradient_clip_val": 1.0,
            "log_every_n_steps": 10,
            "max_epochs": 1,  # of the order in which windows come, which holds as many of ours as are asked for
            "num_sanity_val_steps": 0,
            "enable_model_summary": False,
            "enable_progress_bar": bar,
            "use_distributed_sampler": False,
            "default_root_dir": str(work),
        }
        | options.trainer
    )
    if logger is not None and (name := asked.get("profiler")):
        asked["profiler"] = _profiler(name, work / "logs")
    if asked.get("strategy") == recover_sharded.NAME:
        asked["strategy"] = recover_sharded.strategy(options.trainer, where)
    try:
        with still():
            return Trainer(**asked, callbacks=callbacks, logger=logger or False)  # type: ignore[arg-type]
    except Exception as e:  # Lightning and its plugins raise many kinds
        why = " ".join(str(e).split()).rstrip(".")[:300]
        raise InputError(f"{where}: recover.trainer: {why}. Change or remove that option.") from e


def _logger(name: str, folder: Path) -> Logger:
    folder.mkdir(parents=True, exist_ok=True)
    if name == "tensorboard":
        return TensorBoardLogger(folder, name="", version="tensorboard")
    if name == "wandb":
        return WandbLogger(
            project="invariance", save_dir=folder, id=folder.parent.name, resume="allow"
        )
    if name == "mlflow":
        return MLFlowLogger(
            "invariance", run_name=folder.parent.name, tracking_uri=f"file:{folder}/mlflow"
        )
    started = sum(
        1 for _ in folder.glob("csv*")
    )  # a logger of its own for each start: it clears what it finds
    return CSVLogger(folder, name="", version=f"csv-{started}")


def _profiler(name: str, folder: Path) -> Profiler:
    """One that writes beside the curves, rather than to Lightning's log, which is silent here."""
    kinds = {"simple": SimpleProfiler, "advanced": AdvancedProfiler, "pytorch": PyTorchProfiler}
    return kinds[name](dirpath=folder, filename=f"{name}-profile")


def fit(trainer: Trainer, module: Recovery, text: Text, last: Path) -> None:
    """Train, from the last checkpoint if there is one.

    Processes that were started to help end here, as only the first one has more to do.
    """
    try:
        with still():
            trainer.fit(module, text, ckpt_path=last if last.is_file() else None, weights_only=True)
    except SystemExit:
        if trainer.interrupted:  # Lightning makes of Ctrl-C an exit with status 1
            raise KeyboardInterrupt from None
        raise
    if trainer.global_rank:
        raise SystemExit(0)


@contextmanager
def still() -> Iterator[None]:
    """Nothing but errors from Lightning: no hints, no list of devices."""
    loggers = [
        logging.getLogger(n)
        for n in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
