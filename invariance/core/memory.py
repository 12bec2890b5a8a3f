"""What memory there is, and giving back what is no longer used."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any


@cache
def _libc() -> Any:
    return ctypes.CDLL("libc.so.6") if sys.platform.startswith("linux") else None


def trim() -> None:
    """Give freed pages back to the system, where its allocator keeps them otherwise (glibc)."""
    try:
        _libc().malloc_trim(0)
    except (OSError, AttributeError):  # another system, or another C library
        return
