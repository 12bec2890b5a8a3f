"""Where errors leave the program: one line on standard error, and an exit status. Nothing else ever comes out."""

from __future__ import annotations

import errno
import io
import os
import re
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress

from ..core.errors import InvarianceError
from .terminal import err

FAILED, INTERRUPTED = 1, 130
TRACEBACK = "INVARIANCE_TRACEBACK"  # set it to see where an unexpected error came from
BYTES = re.compile(r"(?:tried to allocate|allocate) ([\d.]+ ?(?:[KMGT]i?B|bytes))", re.IGNORECASE)


def leaving(program: Callable[[], object]) -> None:
    """Run a program; whatever it raises becomes an exit status: 2 input, 1 failed under way, 130 Ctrl-C."""
    print_anything()
    try:
        program()
        sys.stdout.flush()
    except KeyboardInterrupt:
        _interrupted()
    except SystemExit as e:
        if e.code == INTERRUPTED:
            _interrupted()
        raise
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(FAILED)
    except BaseException as e:
        _tell(told(e))
        if os.environ.get(TRACEBACK):
            traceback.print_exception(e)
        sys.exit(e.exit_status if isinstance(e, InvarianceError) else FAILED)


def told(e: BaseException) -> str:
    """An error in one line that says what to do, whichever library raised it."""
    said = " ".join(str(e).split())
    if isinstance(e, InvarianceError):
        return str(e)
    if is_full(e):
        name = getattr(e, "filename", None)
        return f"the disk is full{f': {name}' if name else ''} ({said}). Make room and run again; nothing half is kept."
    if is_memory(e):
        much = BYTES.search(said)
        asked = f": {much[1]} more could not be had" if much else ""
        return f"memory ran out{asked}. Take a smaller batch or model, fewer tokens at a time, or a larger machine."
    if isinstance(e, OSError):
        name = f"{e.filename}: " if e.filename else ""
        return f"{name}{e.strerror or said}. Nothing half is kept."
    if isinstance(e, UnicodeError):
        return f"text holds characters that cannot be written ({said[:200]}). Take them out of names and recipes."
    if isinstance(e, RecursionError):
        return "something is nested too deeply. Is it the right file?"
    return (
        f"unexpected {type(e).__name__}: {said[:500] or 'no message'}. This is a fault of the program; {TRACEBACK}=1 in the "
        "environment shows where."
    )


def is_full(e: BaseException) -> bool:
    """Whether a disk or a quota had no room; the libraries in Rust say so in words only."""
    full = (errno.ENOSPC, errno.EDQUOT)
    return (isinstance(e, OSError) and e.errno in full) or any(
        word in str(e) for word in ("No space left on device", "os error 28", "StorageFull")
    )


def is_memory(e: BaseException) -> bool:
    """Whether memory could not be had, of the machine or of a device."""
    named = type(e).__name__ == "OutOfMemoryError" or isinstance(e, MemoryError)
    if isinstance(e, OSError) and e.errno == errno.ENOMEM:
        return True
    text = str(e)
    return named or (
        isinstance(e, RuntimeError)
        and ("not enough memory" in text or "out of memory" in text or "bad_alloc" in text)
    )


def print_anything() -> None:
    """Characters that a terminal's encoding lacks become question marks; they would be an error after hours of work."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _interrupted() -> None:
    _tell_plain("stopped; what was there before is untouched")
    sys.exit(INTERRUPTED)


def _tell(message: str) -> None:
    from rich.markup import escape

    _tell_plain(f"[red]error:[/] {escape(message)}")


def _tell_plain(markup: str) -> None:
    with suppress(OSError):  # nobody listens
        err.print(markup, soft_wrap=True, highlight=False)
