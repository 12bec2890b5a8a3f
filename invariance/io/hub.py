"""How models are fetched: the hub that may not answer, the cache, quiet libraries, and errors of one line."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from rich.console import Console

from ..core.cache import cache_dir
from ..core.errors import InputError
from ..core.paths import expanded
from .packaged import PACKAGED

FORMS = "Give a hub id (owner/name), a folder that save_pretrained wrote, a .gguf file, or packaged:NAME."


def converted(name: str) -> Path:
    """Where packaged weights are kept as safetensors."""
    return cache_dir("models") / f"{name}-{PACKAGED[name].digest}"


@contextmanager
def hub() -> Iterator[bool]:
    """Whether the hub answers; if not, its libraries read their cache at once instead of retrying."""
    constants: Any = huggingface_hub.constants
    was = constants.HF_HUB_OFFLINE
    try:
        huggingface_hub.get_session().head(constants.ENDPOINT, timeout=5)
        online = not was
    except Exception:  # whichever HTTP client is installed: no answer is no answer
        online = False
    constants.HF_HUB_OFFLINE = not online
    try:
        yield online
    finally:
        constants.HF_HUB_OFFLINE = was


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no warnings from transformers."""
    log = transformers.utils.logging
    verbosity, bar = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.set_verbosity(verbosity)
        if bar:
            log.enable_progress_bar()


@contextmanager
def reading(model: str, what: str) -> Iterator[None]:
    """Quiet, quick to give up on a hub that does not answer; any failure becomes one line about the input."""
    packaged = model.startswith("packaged:")
    local = packaged or expanded(model).exists()
    with (
        quiet(),
        nullcontext(False) if local else hub() as online,
        progress(f"Reading {model}", online),
    ):
        try:
            yield
        except (MemoryError, torch.OutOfMemoryError, InputError):
            raise  # an error of ours says where and what to do
        except (
            Exception
        ) as e:  # transformers, safetensors, gguf and the hub client each raise their own
            if not local and not online:
                raise InputError(
                    f"model '{model}': no such folder, the model hub cannot be reached, and its local cache "
                    f"lacks the {what}. {FORMS}"
                ) from e
            if packaged:
                remedy = f"Delete {converted(model.removeprefix('packaged:'))} and run again."
            elif local:
                remedy = "Save or download the model again."
            else:
                remedy = "Check the name; a gated model needs `hf auth login`."
            raise InputError(f"{model}: the {what} cannot be read: {line(e)}. {remedy}") from e


def progress(message: str, shown: bool = True) -> AbstractContextManager[object]:
    return Console(file=sys.stderr).status(message) if shown else nullcontext()


def line(e: Exception, limit: int = 300) -> str:
    line = " ".join(str(e).split()) or type(e).__name__
    return (line if len(line) <= limit else f"{line[:limit]} …").rstrip(".")
