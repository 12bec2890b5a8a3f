"""One writer at a time: a lock that the system lets go of when its process ends, however it ends."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # no POSIX system: then nothing guards against a second writer
    fcntl = None  # type: ignore[assignment]

TAKEN = (errno.EACCES, errno.EAGAIN)
_HELD: set[tuple[int, int]] = set()  # by device and inode: the system's locks are of a process
_KEPT: set[tuple[int, int]] = set()  # those that are held to the end


class Taken(Exception):
    """Somebody else holds the lock."""


class Lock:
    """A lock on a file, which is made. POSIX locks are not inherited, work over NFS, and end with their process."""

    def __init__(self, path: Path) -> None:
        """Raises Taken; FileNotFoundError where the folder of the file is gone."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self.handle = os.open(path, flags, 0o600)
        found = os.fstat(self.handle)
        self.key = (found.st_dev, found.st_ino)
        try:
            if self.key in _HELD:
                raise Taken(path)
            _lock(self.handle, path)
            there = os.stat(path)  # its last owner may have removed it since it was opened
            if (there.st_dev, there.st_ino) != self.key:
                raise FileNotFoundError(errno.ENOENT, "removed meanwhile", str(path))
        except BaseException:
            if self.key not in _HELD:  # closing any handle would let go of a lock that is held
                os.close(self.handle)
            raise
        _HELD.add(self.key)

    def release(self) -> None:
        _HELD.discard(self.key)
        os.close(self.handle)


def _lock(handle: int, path: Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno in TAKEN:
            raise Taken(path) from None
        if e.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):  # no locks there
            raise


def keep(path: Path) -> None:
    """Hold a lock until this process ends; again, where it holds it already. Raises Taken."""
    with suppress(FileNotFoundError):
        found = os.stat(path)
        if (found.st_dev, found.st_ino) in _KEPT:
            return
    _KEPT.add(Lock(path).key)


def is_helper() -> bool:
    """Whether this process was started to help another one with the same work, as torchrun, Slurm and Lightning do."""
    ranks = ("RANK", "LOCAL_RANK", "SLURM_PROCID")
    return any(os.environ.get(name, "0") not in ("", "0") for name in ranks)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C waits until the block is over.

    The system may tell any thread of a signal, so masking it in one would not do; what it does is done in the main one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    held = {s: handler for s, handler in before.items() if handler not in (None, signal.SIG_IGN)}
    for s in held:
        signal.signal(s, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for s, handler in held.items():
            signal.signal(s, handler)
        for number in came:
            signal.raise_signal(number)
