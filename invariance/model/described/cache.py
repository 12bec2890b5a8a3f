"""Layouts kept as files, by config, version of the library and version of the rules. Anything else counts as missing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig

from ...core.errors import InputError
from ...core.files import replacing
from . import text
from .check import check
from .description import Description

PASSING = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "quantization_config")


def key(config: PretrainedConfig, rules: str) -> str:
    """What a layout hangs on: the config without what only its weights hang on, and both versions."""
    told = {k: v for k, v in config.to_dict().items() if k not in PASSING}
    held = json.dumps(told, sort_keys=True, default=str)
    stamp = f"{text.FORMAT} {rules} {transformers.__version__} {torch.__version__}\n{held}"
    return hashlib.sha256(stamp.encode()).hexdigest()[:32]


def rules_version() -> str:
    """A hash of the sources that a layout comes from: other rules, other layouts."""
    here = Path(__file__).parent
    made = hashlib.sha256()
    for path in sorted([*(here.parent / "derive").rglob("*.py"), *here.glob("*.py")]):
        made.update(path.read_bytes())
    return made.hexdigest()[:16]


def kept(
    folder: Path,
    config: PretrainedConfig,
    model: nn.Module,
    make: Callable[[], Description],
    rules: str | None = None,
) -> Description:
    """The layout of a config: read from the folder where it is whole and fits the model (on meta), else made."""
    name = key(config, rules or rules_version())
    path = folder / f"{name}.layout"
    found = _read(path, model)
    if found is None:
        found = make()
        body = text.write(found)
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as new:
            new.write_text(f"sha256 {_digest(body)}\n{body}", encoding="utf-8")
    return found


def _digest(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()


def _read(path: Path, model: nn.Module) -> Description | None:
    try:
        head, _, body = path.read_text(encoding="utf-8").partition("\n")
        if head != f"sha256 {_digest(body)}":
            return None
        found = text.read(body, str(path))
        check(found, model, str(path))
    except (OSError, UnicodeDecodeError, InputError):
        return None
    return found
