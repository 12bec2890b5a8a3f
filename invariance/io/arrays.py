"""Arrays in .npy files, whose header is believed only as far as the file's size bears it out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.lib import format as npy
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..core.errors import InputError

READERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


class Header(BaseModel):
    """What an .npy file says of itself."""

    model_config = ConfigDict(strict=True)

    shape: tuple[Annotated[int, Field(ge=0)], ...]
    fortran: bool
    itemsize: Annotated[int, Field(ge=1)]


def open_array(path: Path, where: str) -> np.ndarray[Any, Any]:
    """A memory map of an .npy file, nothing of it read yet. Raises InputError."""
    try:
        with path.open("rb") as file:
            version = npy.read_magic(file)
            if version not in READERS:
                raise ValueError(f"version {version} of the format")
            shape, fortran, dtype = READERS[version](file)
            header = Header(shape=shape, fortran=fortran, itemsize=dtype.itemsize)
            start, size = file.tell(), path.stat().st_size
        needed = start + header.itemsize * math.prod(header.shape)
        if dtype.hasobject:
            raise ValueError("it holds Python objects, which are not read")
        if size < needed:
            raise ValueError(f"shape {shape} takes {needed:,} bytes, and the file has {size:,}")
        found = np.load(
            path, mmap_mode="r" if math.prod(header.shape) else None, allow_pickle=False
        )
        assert isinstance(found, np.ndarray)
        return found
    except ValidationError as e:
        key = ".".join(map(str, e.errors()[0]["loc"]))
        raise InputError(
            f"{where}: its header cannot be: {key} is {e.errors()[0]['input']}. {AGAIN}"
        ) from None
    except MemoryError:
        raise
    except Exception as e:  # a header is text that numpy evaluates as a literal: many kinds
        said = " ".join(str(e).split())[:200] or type(e).__name__
        raise InputError(f"{where}: numpy.load fails ({said}). {AGAIN}") from None


AGAIN = "Write it with numpy.save, as integers of shape (sequences, tokens)."
