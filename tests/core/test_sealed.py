"""What is kept between runs counts only as it was written: no flipped bit, swapped file or other folder's passes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from invariance.core.files import write_tensors
from invariance.core.sealed import read_kept, read_kept_json, write_kept, write_kept_json

TENSORS = {
    "total": torch.arange(12.0, dtype=torch.float64).reshape(3, 4),
    "half": torch.ones(5, dtype=torch.bfloat16),
    "count": torch.tensor(7),
    "none": torch.zeros(0, 3),
}
VALUE = {"a": [1.5, None, "ü"], "b": {}}


def flipped(path: Path) -> None:
    """The lowest bit of the last number."""
    raw = bytearray(path.read_bytes())
    raw[-9] ^= 1
    path.write_bytes(raw)


def swapped(path: Path) -> None:
    other = path.with_name(f"other{path.suffix}")
    os.replace(path, path.with_name("aside"))
    os.replace(other, path)


def of_another_model(path: Path) -> None:
    os.replace(path.parent.parent / "another" / path.name, path)


FAULTS: dict[str, Callable[[Path], object]] = {
    "flipped": flipped,
    "swapped": swapped,
    "of another model": of_another_model,
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-20]),
    "empty": lambda path: path.write_bytes(b""),
    "junk": lambda path: path.write_bytes(b"[1, 2]"),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_tensors_that_are_not_as_they_were_written_count_as_missing(
    fault: str, tmp_path: Path
) -> None:
    path = tmp_path / "model" / "x.safetensors"
    others = {"total": 1 + TENSORS["total"]}
    write_kept(path, TENSORS)
    write_kept(path.with_name("other.safetensors"), others)
    write_kept(tmp_path / "another" / path.name, others)
    found = read_kept(path)
    assert found is not None and set(found) == set(TENSORS)
    assert all(torch.equal(found[name], value) for name, value in TENSORS.items())
    FAULTS[fault](path)
    assert read_kept(path) is None


@pytest.mark.parametrize("fault", FAULTS)
def test_plain_data_that_is_not_as_it_was_written_counts_as_missing(
    fault: str, tmp_path: Path
) -> None:
    path = tmp_path / "model" / "x.json"
    write_kept_json(path, VALUE)
    write_kept_json(path.with_name("other.json"), [2])
    write_kept_json(tmp_path / "another" / path.name, [2])
    assert read_kept_json(path) == VALUE
    write_kept_json(path, {8: 1.0, 16: 0.1})
    assert read_kept_json(path) == {"8": 1.0, "16": 0.1}  # keys in another order than as numbers
    FAULTS[fault](path)
    assert read_kept_json(path) is None


def test_what_has_no_checksum_counts_as_missing(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x.safetensors", TENSORS)
    assert read_kept(tmp_path / "x.safetensors") is None
    (tmp_path / "x.json").write_text('{"value": 1}')
    assert read_kept_json(tmp_path / "x.json") is None


def test_a_folder_may_move_as_a_whole(tmp_path: Path) -> None:
    write_kept(tmp_path / "a" / "model" / "x.safetensors", TENSORS)
    (tmp_path / "a").rename(tmp_path / "b")
    assert read_kept(tmp_path / "b" / "model" / "x.safetensors") is not None
