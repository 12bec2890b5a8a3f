"""Paths as people write them, and files that may be read."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from .errors import InputError


def expanded(text: str | Path, where: str = "") -> Path:
    """A path with `~` replaced. Raises InputError where there is no such user, or where no path can be so long."""
    told = f"{where}: {text}" if where else str(text)
    try:
        path = Path(text).expanduser()
        os.stat(path)
    except FileNotFoundError:
        pass
    except RuntimeError:
        raise InputError(
            f"{told}: there is no user of that name here. Write the folder out."
        ) from None
    except (OSError, ValueError) as e:
        if not isinstance(e, NotADirectoryError | PermissionError):
            raise InputError(
                f"{told}: {getattr(e, 'strerror', None) or e}. Give another path."
            ) from None
    return path


def check_regular(path: Path, what: str) -> None:
    """Raises InputError for pipes, sockets and devices, which may keep a reader waiting for ever; nothing may be there."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise InputError(f"{path}: it is no regular file. Give the path of a {what}.")
