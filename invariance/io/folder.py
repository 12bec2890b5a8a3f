"""The folder in which a model's weights lie as floating-point safetensors, whatever form they came in."""

from __future__ import annotations

import hashlib
from pathlib import Path

from transformers.utils.hub import cached_file

from ..core.cache import cache_dir
from .hub import reading
from .kept import file_digest, keep
from .models import is_rounded, load_model, locate
from .shards import INDEX, SINGLE, files_of


def float_folder(model: str, *, trust_remote_code: bool = False) -> Path:
    """A local folder with a config and safetensors of the model. Raises InputError.

    From the hub it is the snapshot in its cache, downloaded if need be. A GGUF file, and weights that torchao rounded,
    are read as a whole once, and kept as the numbers that they stand for in the cache.
    """
    place = locate(model)
    folder = Path(place["pretrained_model_name_or_path"])
    gguf = place.get("gguf_file")
    if gguf is None and not folder.is_dir():
        folder = _snapshot(model)
    if not is_rounded(model, trust_remote_code=trust_remote_code):
        return folder
    content = [folder / gguf] if gguf else [*files_of(folder), folder / "config.json"]
    key = hashlib.sha256("".join(map(file_digest, content)).encode()).hexdigest()[:16]
    kept = cache_dir("models") / f"{Path(gguf or folder).stem}-{key}"
    keep(
        kept,
        lambda made: load_model(model, trust_remote_code=trust_remote_code).save_pretrained(made),
    )
    return kept


def _snapshot(model: str) -> Path:
    """The weights of a hub id in the hub's own cache, downloaded where they are not there."""
    with reading(model, "weights"):
        config = str(cached_file(model, "config.json"))
        cached_file(model, "generation_config.json", _raise_exceptions_for_missing_entries=False)
        if cached_file(model, SINGLE, _raise_exceptions_for_missing_entries=False) is None:
            cached_file(model, INDEX)
        folder = Path(config).parent
        for file in files_of(folder, present=False):
            cached_file(model, file.name)
    return folder
