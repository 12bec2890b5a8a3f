"""What a checkpoint must be before anything is computed from it; each fault is refused by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import InputError
from .configs import read_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def check_folder(folder: Path) -> None:
    """Refuse a folder whose config.json is absent, broken, or silent about the family."""
    path = folder / "config.json"
    if not path.is_file():
        named = ", ".join(sorted(f.name for f in folder.glob("*.gguf")))
        raise InputError(
            f"{folder}: no config.json in this folder, so what the model is cannot be told. "
            + (
                f"Name the file to read: {named}."
                if named
                else "Give the folder that save_pretrained wrote."
            )
        )
    read_config(path)
    if (folder / "adapter_config.json").is_file():
        raise InputError(
            f"{folder}: holds an adapter (adapter_config.json) beside the model, and what is computed would be of one "
            "of the two. Merge the adapter into the model first (peft: merge_and_unload), and save that."
        )


def check_format(model: str, folder: Path, config: PretrainedConfig) -> None:
    """Refuse weights that can be read, but not safely or not as floating point."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None and quantization.get("quant_method") == "torchao":
        from .rounded import check_installed

        check_installed(model)
    elif quantization is not None:
        raise InputError(
            f"{model}: its weights are quantized, and a quantized weight cannot change its basis. Give the checkpoint "
            "that it was quantized from, or one of torchao or a GGUF file, which are read as floating point."
        )
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        pickles = ", ".join(
            sorted(f.name for ending in ("bin", "pt", "pth") for f in folder.glob(f"*.{ending}"))
        )
        raise InputError(
            f"{model}: no safetensors file in this folder"
            + (f"; {pickles} would have to be unpickled, which can run any code" if pickles else "")
            + ". Save the weights with save_pretrained, which writes safetensors."
        )


def check_keys(model: str, keys: Mapping[str, Iterable[Any]]) -> None:
    """Refuse a checkpoint that leaves a tensor to chance, or whose tensors would be dropped in silence."""
    mismatched = [
        f"{name} {tuple(there)} for {tuple(here)}" for name, there, here in keys["mismatched_keys"]
    ]
    for fault, tensors in (
        ("lacks", keys["missing_keys"]),
        ("holds tensors that its config has no place for:", keys["unexpected_keys"]),
        ("holds tensors of the wrong shape:", mismatched),
    ):
        if names := sorted(tensors):
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise InputError(
                f"{model}: the checkpoint {fault} {', '.join(names[:5])}{more}. "
                "Config and weights do not belong together; save or download both again."
            )
