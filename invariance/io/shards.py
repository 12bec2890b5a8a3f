"""The safetensors files of a checkpoint: what their headers say, and their tensors one at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..core.errors import InputError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U8": torch.uint8, "BOOL": torch.bool},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}
CHUNK = 2**22  # numbers that are looked at together


@dataclass(frozen=True)
class Stored:
    """A tensor as the header of its file describes it."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def files_of(folder: Path, *, present: bool = True) -> list[Path]:
    """The safetensors files that make up a checkpoint, all of them there if ``present``. Raises InputError."""
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file():  # transformers takes it first, too
        return [single]
    if not index.is_file():
        raise InputError(
            f"{folder}: neither {SINGLE} nor {INDEX}. Save the weights with save_pretrained, which writes them."
        )
    files = [folder / name for name in sorted(set(_weight_map(index).values()))]
    for file in files:
        if present and not file.is_file():
            raise InputError(
                f"{index}: names the file '{file.name}', which is not there. Download or save the checkpoint again."
            )
    return files


def stored(folder: Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint by its name in the files, from their headers alone. Raises InputError."""
    files = files_of(folder)
    found = {s.key: s for file in files for s in header(file)}
    if files != [folder / SINGLE]:
        for key, name in _weight_map(folder / INDEX).items():
            if key not in found or found[key].file.name != name:
                raise InputError(
                    f"{folder / INDEX}: {name} does not hold {key}. Download or save all files of the checkpoint again."
                )
    return found


def _weight_map(index: Path) -> Mapping[str, str]:
    """Which file holds which tensor; names of files in the index's own folder."""
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = {str(key): str(name) for key, name in found.items()}
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as e:
        raise InputError(
            f"{index}: no weight_map in it ({type(e).__name__}: {e}). Download or save the checkpoint again."
        ) from None
    for name in sorted(set(names.values())):
        if PurePath(name).name != name or name in ("", ".", "..") or "\\" in name:
            raise InputError(
                f"{index}: names the file '{name}', which does not lie in this folder; nothing outside of it is read. "
                f"Put all files of the checkpoint into one folder and name them without a path."
            )
    return names


def header(file: Path) -> list[Stored]:
    """What one file says of its tensors. Raises InputError."""
    try:
        with safe_open(file, "pt", backend="pread") as tensors:
            slices = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118
            described = {k: (tuple(s.get_shape()), s.get_dtype()) for k, s in slices.items()}
    except (SafetensorError, OSError) as e:
        raise InputError(
            f"{file}: the weights cannot be read: {' '.join(str(e).split())}. Save or download the model again."
        ) from None
    for key, (_, dtype) in described.items():
        if dtype not in DTYPES:
            raise InputError(
                f"{file}: {key} is stored as {dtype}, which is no kind of number that is read here. "
                "Save the weights as float32 or bfloat16."
            )
    return [Stored(file, key, shape, DTYPES[dtype]) for key, (shape, dtype) in described.items()]


def read(tensors: Iterable[Stored]) -> Iterator[tuple[str, Tensor]]:
    """The tensors, each in memory of its own, file by file; no file stays open or mapped."""
    by_file: dict[Path, list[str]] = {}
    for tensor in tensors:
        by_file.setdefault(tensor.file, []).append(tensor.key)
    for file, keys in by_file.items():
        with _open(file, "pread") as found:
            for key in keys:
                yield key, found.get_tensor(key)


def rows(tensor: Stored, index: Tensor) -> Tensor:
    """Some rows of a tensor; no other part of its file is read, not even by the pages of a mapped file."""
    size = math.prod(tensor.shape[1:]) * tensor.dtype.itemsize
    raw = torch.empty(len(index), size, dtype=torch.uint8)
    with _reading(tensor.file), tensor.file.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        start = 8 + length + json.loads(file.read(length))[tensor.key]["data_offsets"][0]
        for row, place in zip(raw.numpy(), index.tolist(), strict=True):
            file.seek(start + place * size)
            if file.readinto(row.data) != size:
                raise EOFError("the file ends in the tensor")
    return raw.view(tensor.dtype).view(len(index), *tensor.shape[1:])


def equal(one: Stored, other: Stored) -> bool:
    """Whether two tensors hold the same numbers; of large ones no more is read than decides it."""
    if one.shape != other.shape:
        return False
    step = max(1, CHUNK // max(1, math.prod(one.shape[1:])))
    with _open(one.file, "mmap") as first, _open(other.file, "mmap") as second:
        a, b = first.get_slice(one.key), second.get_slice(other.key)
        return all(
            torch.equal(a[i : i + step].double(), b[i : i + step].double())
            for i in range(0, one.shape[0], step)
        )


@contextmanager
def _open(file: Path, backend: str) -> Iterator[Any]:
    with _reading(file), safe_open(file, "pt", backend=backend) as tensors:
        yield tensors


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, EOFError, ValueError, LookupError) as e:
        raise InputError(
            f"{file}: the weights cannot be read: {' '.join(str(e).split())}. It changed while it was being read; "
            "save or download the model again."
        ) from None


def check_finite(model: str, name: str, tensor: Tensor) -> None:
    """Refuse NaN and infinite weights. Numpy looks for them many times as fast as torch does on a CPU."""
    if not tensor.is_floating_point():
        return
    for part in tensor.detach().reshape(-1).split(CHUNK):
        values = part.float() if part.element_size() < 4 else part
        if not np.isfinite(values.cpu().numpy()).all():
            raise InputError(
                f"{model}: {name} holds NaN or infinite weights, and nothing can be computed from it. "
                "Use another checkpoint, or another dtype if the weights overflow in this one."
            )
