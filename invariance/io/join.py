"""Safetensors files put together into one, without their tensors in memory."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from .shards import DTYPES

CHECKPOINT = {"format": "pt"}  # what transformers wants to read in a file of weights


def join(parts: Sequence[Path], path: Path, metadata: Mapping[str, str] = CHECKPOINT) -> None:
    """One file with all tensors of several: their bytes one after the other, behind one header.

    The format: 8 bytes of length (little endian), a header in JSON that says of each tensor where its bytes begin and
    end, then the bytes.
    """
    found = list[tuple[Path, int, str, dict[str, Any]]]()
    for part in parts:
        begin, header = _header(part)
        found += [(part, begin, name, about) for name, about in header.items()]
    found.sort(
        key=lambda each: -DTYPES[each[3]["dtype"]].itemsize
    )  # so each lies at a multiple of its size
    whole: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for _, _, name, about in found:
        if name in whole:
            raise ValueError(f"{name} was written twice")
        length = about["data_offsets"][1] - about["data_offsets"][0]
        whole[name] = about | {"data_offsets": [at, at + length]}
        at += length
    text = json.dumps(whole, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for part, begin, _, about in found:
            first, last = about["data_offsets"]
            with part.open("rb") as body:
                body.seek(begin + first)
                _copy(body, file, last - first)


def _copy(source: BinaryIO, target: BinaryIO, length: int) -> None:
    while length:
        some = source.read(min(length, 2**22))
        if not some:
            raise ValueError("a part of the checkpoint ends before its tensors do")
        target.write(some)
        length -= len(some)


def _header(part: Path) -> tuple[int, dict[str, Any]]:
    """Where the bytes of a file's tensors begin, and what it says of each."""
    with part.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        found: dict[str, Any] = json.loads(file.read(length))
    found.pop("__metadata__", None)
    return 8 + length, found
