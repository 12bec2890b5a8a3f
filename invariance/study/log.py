"""The results of a study for other people's dashboards, through Lightning's loggers."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..core.errors import InputError, did_you_mean
from .study import Study
from .table import DONE, Row

LOGGERS = {
    "tensorboard": ("tensorboardX", "tensorboard"),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
    "csv": (),
}


def check(name: str) -> None:
    """Raises InputError for a logger that is unknown, or whose package is not installed: before anything runs."""
    if name not in LOGGERS:
        raise InputError(
            f"--logger {name}: no logger is called '{name}'{did_you_mean(name, list(LOGGERS))}"
        )
    packages = LOGGERS[name]
    if packages and not any(find_spec(p) for p in packages):
        raise InputError(
            f"--logger {name}: the package {packages[0]} is not installed. Run `pip install {packages[0]}`, or take "
            "`--logger csv`."
        )


def log(names: Sequence[str], folder: Path, study: Study, rows: Sequence[Row]) -> None:
    """Every finished run as one of the logger's: what varies as parameters, numbers as metrics."""
    for name in names:
        for row in {r["run"]: r for r in rows if r["status"] == DONE}.values():
            logger = _logger(name, folder, study.name, row["run"])
            logger.log_hyperparams({f: row[f] for f in study.factors})
            numbers = {
                k: float(v)
                for k, v in row.items()
                if isinstance(v, int | float) and k not in study.factors
            }
            logger.log_metrics(numbers, step=0)
            logger.save()
            logger.finalize("success")


def _logger(name: str, folder: Path, study: str, run: str) -> Any:
    from lightning.pytorch import loggers

    if name == "tensorboard":
        return loggers.TensorBoardLogger(folder / "logs", name=study, version=run)
    if name == "wandb":
        return loggers.WandbLogger(
            name=run, project=study, save_dir=folder / "logs", group=study, reinit=True
        )
    if name == "mlflow":
        return loggers.MLFlowLogger(
            study, run_name=run, tracking_uri=f"file:{folder / 'logs' / 'mlflow'}"
        )
    return loggers.CSVLogger(folder / "logs", name=study, version=run)
