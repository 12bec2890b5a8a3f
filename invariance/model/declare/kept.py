"""What was read of configs, kept in this process and between processes."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig

from ...core.cache import cache_dir, hashed
from ...core.errors import InputError
from ...core.sealed import read_kept_json, write_kept_json
from ..architecture import Architecture, Attention, Mlp, Rms, Stage
from .apart import apart
from .proof import prove
from .small import small_model, small_values
from .whole import architecture_of


def read(kind: str, config: PretrainedConfig) -> Architecture | str:
    """The architecture of a config of a model type, or why the grammar does not speak of it."""
    return _read(kind, json.dumps(small_values(config), sort_keys=True, default=str))


@cache
def _read(kind: str, told: str) -> Architecture | str:
    """By the small config's values as text: what the result hangs on and nothing else."""
    path = _place(kind, told)
    kept = None if path is None else read_kept_json(path)
    if kept is not None:
        return kept if isinstance(kept, str) else from_plain(kept)
    try:
        with apart():
            found = _tried(kind, json.loads(told))
    except Exception as e:  # each type fails in its own way, which may not be for good
        why = " ".join(f"{type(e).__name__}: {e}".split())[:200]
        return f"no small model of its config.json can be built, run and rewritten ({why})"
    if path is not None:
        with suppress(OSError):
            write_kept_json(path, found if isinstance(found, str) else asdict(found))
    return found


def _place(kind: str, told: str) -> Path | None:
    """Where a result is kept; None where there is no cache, which models are loaded without too."""
    versions = (transformers.__version__, torch.__version__, _rules(), _code(kind))
    try:
        return cache_dir("layouts") / f"{hashed(kind, told, *versions)}.grammar.json"
    except InputError:
        return None


def _tried(kind: str, values: dict[str, Any]) -> Architecture | str:
    made = small_model(kind, values)
    try:
        arch = architecture_of(made)
        prove(made, arch)
    except InputError as e:
        return str(e)
    return arch


def from_plain(plain: Mapping[str, Any]) -> Architecture:
    """The architecture that ``asdict`` made plain and JSON kept."""
    stages = tuple(
        Stage(
            **{
                **stage,
                "attention": stage["attention"] and Attention(**stage["attention"]),
                "mlp": stage["mlp"] and Mlp(**stage["mlp"]),
            }
        )
        for stage in plain["stages"]
    )
    own = {
        "embed": tuple(plain["embed"]),
        "stages": stages,
        "rms": Rms(**plain["rms"]),
        "widths": tuple((kind, key) for kind, key in plain["widths"]),
    }
    return Architecture(**{**plain, **own})


@cache
def _rules() -> str:
    """A hash of the sources that a reading comes from."""
    room = Path(__file__).parents[1]
    sources = [*room.glob("*.py"), *room.glob("declare/*.py"), *room.glob("tiny/*.py")]
    made = hashlib.sha256()
    for path in sorted([*sources, *room.glob("derive/*.py")]):
        made.update(path.read_bytes())
    return made.hexdigest()[:16]


def _code(kind: str) -> str:
    """A hash of the source of a type's model, where that is no part of transformers."""
    if kind not in CONFIG_MAPPING:
        return ""
    config = CONFIG_MAPPING[kind]
    if config.__module__.startswith("transformers.") or config not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return ""
    try:
        model: Any = MODEL_FOR_CAUSAL_LM_MAPPING[config]
        source = Path(inspect.getfile(model)).read_bytes()
    except (OSError, TypeError):
        return ""
    return hashlib.sha256(source).hexdigest()[:16]
