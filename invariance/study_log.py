"""The results of a study for other people's dashboards, through Lightning's loggers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import InputError
from .study import Study
from .study_table import DONE, Row


def log(names: Sequence[str], folder: Path, study: Study, rows: Sequence[Row]) -> None:
    """Every finished run as one of the logger's: what varies as parameters, numbers as metrics."""
    for name in names:
        for row in {r["run"]: r for r in rows if r["status"] == DONE}.values():
            logger = _logger(name, folder, study.name, row["run"])
            logger.log_hyperparams({f: row[f] for f in study.factors})
            numbers = {
                k: float(v) for k, v in row.items() if isinstance(v, int | float) and k not in study.factors
            }
            logger.log_metrics(numbers, step=0)
            logger.save()
            logger.finalize("success")


def _logger(name: str, folder: Path, study: str, run: str) -> Any:
    from lightning.pytorch import loggers

    try:
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
    except ModuleNotFoundError as e:
        raise InputError(
            f"--logger {name}: {str(e).split('.')[0]}. Install the package, or take `--logger csv`."
        ) from None
