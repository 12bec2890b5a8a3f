"""From a hub id, a local folder, a GGUF file or packaged weights to a model, its config and its tokenizer."""

from __future__ import annotations

import hashlib
import io
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub
import torch
import transformers
from gguf import GGUFReader
from rich.console import Console
from torch import Tensor

from ..core.errors import InputError, did_you_mean
from ..core.files import replacing
from .packaged import PACKAGED, download
from .weights import check_finite, check_folder, check_format, check_keys

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

FORMS = "Give a hub id (owner/name), a folder that save_pretrained wrote, a .gguf file, or packaged:NAME."
TOKENIZERS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
)


def load_config(model: str, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The configuration of a model, without its weights (packaged ones are fetched on first use)."""
    source = _source(model)
    with _reading(model, "configuration"):
        return transformers.AutoConfig.from_pretrained(
            **source, trust_remote_code=trust_remote_code
        )


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
            f"device '{device}': {_line(e)}. Use `cpu`, or a device that this machine has."
        ) from e
    source = _source(model)
    gguf = "gguf_file" in source
    if not gguf:
        config = load_config(model, trust_remote_code=trust_remote_code)
        check_format(model, Path(source["pretrained_model_name_or_path"]), config)
    read: Any = transformers.AutoModelForCausalLM.from_pretrained
    with _reading(model, "weights"), redirect_stderr(io.StringIO()) if gguf else nullcontext():
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
    check_finite(model, loaded)
    if (
        gguf or rounded
    ):  # floating point now, but the model says otherwise and would refuse to be saved
        vars(loaded.config).pop("quantization_config", None)
        for attribute in ("hf_quantizer", "is_quantized", "quantization_method"):
            vars(loaded).pop(attribute, None)
    return loaded.to(device).eval()


def is_rounded(model: str, *, trust_remote_code: bool = False) -> bool:
    """Whether the weights are stored in few bits; ``load_model`` makes them the numbers that they stand for."""
    config = load_config(model, trust_remote_code=trust_remote_code)
    return Path(model).suffix == ".gguf" or getattr(config, "quantization_config", None) is not None


def load_tokenizer(model: str, *, trust_remote_code: bool = False) -> Any | None:
    """The tokenizer beside a model's weights; None for a local folder that holds none."""
    source = _source(model)
    folder = Path(source["pretrained_model_name_or_path"])
    if (
        "gguf_file" not in source
        and folder.is_dir()
        and not any((folder / f).exists() for f in TOKENIZERS)
    ):
        return None
    with _reading(model, "tokenizer"):
        return transformers.AutoTokenizer.from_pretrained(
            **source, trust_remote_code=trust_remote_code
        )


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
    source = _source(model)
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
    source = _source(model)
    folder = Path(source["pretrained_model_name_or_path"])
    if "gguf_file" in source:
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


def cache_dir(*parts: str) -> Path:
    """A folder below ``$INVARIANCE_CACHE`` (``~/.cache/invariance`` if unset), made if it is not there."""
    root = os.environ.get("INVARIANCE_CACHE") or Path.home() / ".cache" / "invariance"
    folder = Path(root).expanduser().joinpath(*parts)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(
            f"cache {folder}: {_line(e)}. Set INVARIANCE_CACHE to a folder that can be written."
        ) from e
    return folder


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
def _reading(model: str, what: str) -> Iterator[None]:
    """Quiet, quick to give up on a hub that does not answer; any failure becomes one line about the input."""
    packaged = model.startswith("packaged:")
    local = packaged or Path(model).expanduser().exists()
    with (
        quiet(),
        nullcontext(False) if local else hub() as online,
        _progress(f"Reading {model}", online),
    ):
        try:
            yield
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except (
            Exception
        ) as e:  # transformers, safetensors, gguf and the hub client each raise their own
            if not local and not online:
                raise InputError(
                    f"model '{model}': no such folder, the model hub cannot be reached, and its local cache "
                    f"lacks the {what}. {FORMS}"
                ) from e
            if packaged:
                remedy = f"Delete {_converted(model.removeprefix('packaged:'))} and run again."
            elif local:
                remedy = "Save or download the model again."
            else:
                remedy = "Check the name; a gated model needs `hf auth login`."
            raise InputError(f"{model}: the {what} cannot be read: {_line(e)}. {remedy}") from e


def _progress(message: str, shown: bool = True) -> AbstractContextManager[object]:
    return Console(file=sys.stderr).status(message) if shown else nullcontext()


def _line(e: Exception, limit: int = 300) -> str:
    line = " ".join(str(e).split()) or type(e).__name__
    return (line if len(line) <= limit else f"{line[:limit]} …").rstrip(".")


def _source(model: str) -> dict[str, str]:
    """Where the weights are, as keyword arguments of ``from_pretrained``."""
    if model.startswith("packaged:"):
        return {"pretrained_model_name_or_path": str(_packaged(model.removeprefix("packaged:")))}
    path = Path(model).expanduser()
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


def _converted(name: str) -> Path:
    return cache_dir("models") / f"{name}-{PACKAGED[name].digest}"


def _packaged(name: str) -> Path:
    """The folder of packaged weights as safetensors: made whole on first use, or not at all."""
    if name not in PACKAGED:
        raise InputError(
            f"packaged:{name}: no packaged weights have this name{did_you_mean(name, PACKAGED)}"
        )
    folder, package = _converted(name), PACKAGED[name]
    if not folder.is_dir():
        with replacing(folder) as made, tempfile.TemporaryDirectory() as scratch:
            with _progress(f"Downloading {package.requirements} (once)"):
                gguf = str(download(name, package, Path(scratch)))
            with _progress(f"Converting {Path(gguf).name} for {folder.parent} (once)"), quiet():
                load_model(gguf).save_pretrained(made)
                transformers.AutoTokenizer.from_pretrained(**_source(gguf)).save_pretrained(made)
    return folder
