"""Rows of a tensor in a safetensors file, read where they lie."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from invariance.core.errors import InputError
from invariance.io import shards

INDEX = torch.tensor([6, 0, 6, 3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("shape", [(7, 5), (7,), (7, 2, 3)], ids=str)
def test_rows_are_those_of_the_whole_tensor(
    tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    file, whole = tmp_path / "model.safetensors", torch.arange(-9, 201)[: 7 * 6].to(dtype)
    whole = whole[: torch.Size(shape).numel()].view(shape)
    save_file({"before": torch.ones(3), "table": whole, "zzz": torch.ones(4)}, file)
    stored = {s.key: s for s in shards.header(file)}["table"]
    assert torch.equal(shards.rows(stored, INDEX), whole[INDEX])
    assert not torch.equal(shards.rows(stored, INDEX.flip(0)), whole[INDEX])


def test_a_file_that_lost_its_header_meanwhile_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"table": torch.ones(7, 5)}, file)
    (stored,) = shards.header(file)
    file.write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(InputError, match="changed while it was being read"):
        shards.rows(stored, INDEX)


def test_a_file_that_was_cut_short_meanwhile_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"table": torch.ones(7, 5)}, file)
    (stored,) = shards.header(file)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(InputError, match="changed while it was being read"):
        shards.rows(stored, INDEX)
