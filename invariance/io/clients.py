"""What other programs need to read a stock checkpoint rightly, beside what this version of transformers writes."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from ..core.files import write_json
from ..model.described.weightless import on_meta

OLDER = ("rope_theta", "rope_scaling", "rope_local_base_freq")
"""The keys by which transformers 4 knows rotary positions; version 5 has ``rope_parameters`` alone."""
TOKENIZER = {"TokenizersBackend": "PreTrainedTokenizerFast"}
"""Classes of tokenizers that version 5 made, and what version 4 calls them; version 5 reads both names alike."""

_PLAIN: Mapping[str, Mapping[str, Any]] = {"mistral": {"sliding_window": None}}
ALTERNATIVES: Mapping[str, Mapping[str, Mapping[str, Any]]] = {"llama": _PLAIN, "qwen2": _PLAIN}
"""Model type → types that hold the same function under weaker config checks, each with the config values it needs."""


def add_older_keys(config: PretrainedConfig) -> None:
    """Let a config say its rotary positions by the older keys too.

    Without them version 4, and programs that read its keys, take their defaults without a word. Version 5 reads the
    same from both.
    """
    found: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    every = found.get("full_attention", found)
    if "rope_theta" not in every:
        return
    values: dict[str, Any] = {"rope_theta": every["rope_theta"]}
    scaling = {k: v for k, v in every.items() if k not in ("rope_theta", "partial_rotary_factor")}
    if every.get("rope_type", "default") != "default":
        values["rope_scaling"] = scaling
    if "partial_rotary_factor" in every:
        values["partial_rotary_factor"] = every["partial_rotary_factor"]
    if (near := found.get("sliding_attention")) is not None:
        values["rope_local_base_freq"] = near["rope_theta"]
    vars(config).update(values)  # `rope_scaling` is another name of `rope_parameters` to setattr


GROUP = 32  # weights that llama.cpp rounds together


def misread(config: PretrainedConfig) -> list[str]:
    """What programs are known to read wrongly, or not at all, of a stock checkpoint with such a config: sentences."""
    config = config.get_text_config()
    found: list[str] = []
    rope: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        found.append(
            "llama.cpp's converter leaves out the factors of its rotary frequencies, and what it makes of this checkpoint "
            "writes nonsense."
        )
    matrices = {
        p.shape[-1] for _, p in on_meta(copy.deepcopy(config)).named_parameters() if p.dim() > 1
    }
    if odd := sorted(width for width in matrices if width % GROUP):
        found.append(
            f"llama.cpp does not quantise matrices with a width that {GROUP} does not divide "
            f"({', '.join(map(str, odd))})."
        )
    periods = getattr(config, "sliding_window_pattern", None) or getattr(
        config, "_sliding_window_pattern", None
    )
    kinds = getattr(config, "layer_types", None) or []
    if periods and any(
        (kind == "full_attention") != ((n + 1) % periods == 0) for n, kind in enumerate(kinds)
    ):
        found.append(
            "llama.cpp's converter takes sliding windows to come in a fixed rhythm, which those of these blocks have not: what it "
            "reads is not quite this model."
        )
    return found


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer, under a class name that version 4 of transformers knows too."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return
    values = json.loads(path.read_text(encoding="utf-8"))
    if (kind := TOKENIZER.get(values.get("tokenizer_class"))) is not None:
        write_json(path, values | {"tokenizer_class": kind})
