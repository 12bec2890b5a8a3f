"""A page that we may write again: its last line says that we wrote it, and with what content."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from .errors import InputError
from .files import write_text

MARK = re.compile(rb"\n(?:<!--|%) made by invariance, sha256 ([0-9a-f]{64})(?: -->)?\n\Z")
HTML, TEX = "<!-- {} -->", "% {}"  # how a comment is written


def check_page(path: Path, flag: str) -> None:
    """Raises InputError where something is that we did not write, or that has changed since."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        return
    except (OSError, ValueError) as e:
        raise InputError(
            f"{flag} {path}: {getattr(e, 'strerror', e)}. Name another file."
        ) from None
    if path.is_symlink() or not path.is_file():
        raise InputError(f"{flag} {path}: it is there, and it is no file. Name another.")
    whole = path.read_bytes()
    mark = MARK.search(whole)
    if mark is None or hashlib.sha256(whole[: mark.start()]).hexdigest() != mark[1].decode():
        raise InputError(
            f"{flag} {path}: the file is there, and it is no page that we wrote. Name another, or move it away."
        )


def write_page(path: Path, text: str, flag: str, comment: str = HTML) -> None:
    """Write a page of HTML or TeX. Raises InputError as ``check_page`` does, and where it cannot be written."""
    check_page(path, flag)
    digest = hashlib.sha256(text.encode()).hexdigest()
    try:
        mark = comment.format(f"made by invariance, sha256 {digest}")
        write_text(path, f"{text}\n{mark}\n")
    except OSError as e:
        raise InputError(f"{flag} {path}: {e.strerror}. Name a file that can be written.") from None
