"""Where what is kept between runs lies, and the names that it has there (sealed.py writes and reads it)."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from .errors import InputError


def cache_dir(*parts: str) -> Path:
    """A folder below ``$INVARIANCE_CACHE`` (``~/.cache/invariance`` if unset), made if it is not there."""
    root = os.environ.get("INVARIANCE_CACHE") or Path.home() / ".cache" / "invariance"
    folder = Path(root).expanduser().joinpath(*parts)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(
            f"cache {folder}: {e.strerror or e}. Set INVARIANCE_CACHE to a folder that can be written."
        ) from e
    return folder


def hashed(*hangs_on: Any) -> str:
    """32 hexadecimal digits of plain data; what JSON does not know counts by its ``str``."""
    text = json.dumps(hangs_on, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
