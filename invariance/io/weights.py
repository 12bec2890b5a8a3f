"""What a checkpoint must be before anything is computed from it; each fault is refused by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import InputError
from .configs import read_config, read_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ADAPTER = "adapter_config.json"  # which PEFT writes


def check_folder(folder: Path) -> None:
    """Refuse a folder whose config.json is absent, broken, or silent about the family, and one that holds an adapter."""
    path, adapter = folder / "config.json", folder / ADAPTER
    if not path.is_file():
        if adapter.is_file():
            raise InputError(f"{folder}: {_of_an_adapter(adapter)}")
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
    if adapter.is_file():
        raise InputError(
            f"{folder}: holds an adapter ({ADAPTER}) beside the model, and what is computed would be of one "
            "of the two. Merge the adapter into the model first (peft: merge_and_unload), and save that."
        )


def _of_an_adapter(path: Path) -> str:
    """What a folder is that holds an adapter of PEFT and no model, and what to do with it."""
    found = read_json(path)
    base = found.get("base_model_name_or_path") if isinstance(found, dict) else None
    named = (
        f"the base model {base[:200]!r}"
        if isinstance(base, str) and base
        else "a base that it does not name"
    )
    return (
        f"holds only an adapter of PEFT ({ADAPTER}), of {named}, and not that model's weights. Merge the "
        "two first, `PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(folder)`, save the "
        "tokenizer there too, and give that folder."
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
