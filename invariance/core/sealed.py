"""What is kept between runs, under a checksum: anything but what was written under this very name counts as missing.

The checksum covers the content, the file's name and its folder's, so that files that changed places are noticed as well.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from .files import finite, write_json, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

SUM = "sha256"


def write_kept(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Keep tensors in a safetensors file."""
    whole = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    write_tensors(path, whole, {SUM: _of_tensors(path, whole)})


def read_kept(path: Path) -> dict[str, Tensor] | None:
    """What ``write_kept`` has written at this path; None where that is not what is there."""
    try:
        with safe_open(path, "pt") as file:
            said = (file.metadata() or {}).get(SUM)
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None
    return found if said == _of_tensors(path, found) else None


def write_kept_json(path: Path, value: Any) -> None:
    """Keep plain data in a JSON file; numbers that are not finite become null."""
    value = json.loads(json.dumps(finite(value)))  # as it is read: keys are text
    write_json(path, {SUM: _of_json(path, value), "value": value})


def read_kept_json(path: Path) -> Any:
    """What ``write_kept_json`` has written at this path; None where that is not what is there."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found["value"] if found[SUM] == _of_json(path, found["value"]) else None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def _begun(path: Path) -> Any:
    return hashlib.sha256(f"{path.absolute().parent.name}/{path.name}\n".encode(errors="replace"))


def _of_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    import torch  # whoever keeps plain data alone needs none

    made = _begun(path)
    for name, value in sorted(tensors.items()):
        made.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        made.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return str(made.hexdigest())


def _of_json(path: Path, value: Any) -> str:
    made = _begun(path)
    made.update(json.dumps(value, sort_keys=True).encode())
    return str(made.hexdigest())
