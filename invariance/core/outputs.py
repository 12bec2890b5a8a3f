"""The folder that a command writes: claimed before work begins, written beside, renamed into place once.

While a command works, ``.NAME.writing`` stands beside the output folder: it holds a lock, the checkpoint as far as it
is, and later the new folder. A process that is killed leaves it behind; the next command that writes there goes on from it,
clears it, or restores the old folder from it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from . import manifest
from .errors import InputError, InvarianceError
from .files import LOCK, NEW, OLD, put, short
from .locks import Lock, Taken, is_helper
from .paths import expanded

WRITING = ".writing"
MODEL = "model"  # a checkpoint that comes about before the rest does
OURS = {LOCK, NEW, OLD, MODEL, f".{MODEL}.partial"}  # what may lie in the folder beside an output
LONGEST = "model/model-00001-of-00001.safetensors.index.json"  # the longest path within an output


@dataclass(frozen=True)
class Claim:
    """A folder that nobody else writes meanwhile; what is in it now stays until the new one is complete."""

    folder: Path
    flag: str
    overwrite: bool

    @contextmanager
    def writing(self) -> Iterator[Path]:
        """An empty folder to fill; it becomes the output when the block ends well."""
        made = self.place / NEW
        made.mkdir()
        yield made
        manifest.seal(made)
        try:
            refuse(self.folder, self.flag, self.overwrite)
        except InputError as e:  # which was not so when the work began, and the work is not lost
            kept = _free(self.folder)
            os.replace(made, kept)
            raise InvarianceError(f"{e} That came about meanwhile; the result is in {kept}.") from e
        put(made, self.folder, self.place / OLD)

    @property
    def place(self) -> Path:
        return self.folder.parent / f".{short(self.folder)}{WRITING}"


@contextmanager
def claimed(
    output: Path,
    *,
    overwrite: bool = False,
    reads: Iterable[str | Path] = (),
    flag: str = "--output",
) -> Iterator[Claim]:
    """Claim an output folder for as long as the block lasts. ``reads`` are files and folders that must stay.

    Raises InputError, with nothing changed, for a folder that cannot be written or may not be replaced.
    """
    folder = Path(os.path.abspath(output))
    claim = Claim(folder, flag, overwrite)
    check_place(folder, flag)
    made = missing_parents(folder)
    try:
        lock = None if is_helper() else hold(claim.place, folder, flag)
    except BaseException:
        remove_empty(made)
        raise
    try:
        if lock is not None:
            restore(claim.place, folder)
        refuse(folder, flag, overwrite)
        check_reads(folder, reads, flag)
        yield claim
    finally:
        if lock is not None:
            shutil.rmtree(claim.place, ignore_errors=True)
            lock.release()
        remove_empty(made)


@contextmanager
def alone(folder: Path, flag: str = "--output") -> Iterator[None]:
    """Keep others from writing into a folder that grows in place. Raises InputError where somebody does already."""
    place = folder.parent / f".{short(folder)}{WRITING}"
    made = missing_parents(folder)
    lock = None if is_helper() else hold(place, folder, flag)
    try:
        yield
    finally:
        if lock is not None:
            shutil.rmtree(place, ignore_errors=True)
            lock.release()
        remove_empty(made)


def check_place(folder: Path, flag: str = "--output") -> None:
    """Raises InputError where no folder can be put: links, files, mount points, too long names."""
    try:
        os.lstat(folder / LONGEST)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as e:
        why = getattr(e, "strerror", None) or e
        raise InputError(f"{flag} {folder}: {why}. Name another folder.") from None
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        raise InputError(
            f"{flag} {folder}: a name with bytes that are no text (UTF-8). Name another folder."
        ) from None
    if folder.is_symlink():
        to = os.path.realpath(folder)
        raise InputError(
            f"{flag} {folder}: a symbolic link to {to}, which would be lost. Name that."
        )
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{flag} {folder}: a file is there. Name a folder.")
    if file := next((p for p in folder.parents if p.exists() and not p.is_dir()), None):
        raise InputError(f"{flag} {folder}: '{file}' is a file. Name a folder that can be made.")


def refuse(folder: Path, flag: str, overwrite: bool) -> None:
    """Raises InputError for a folder that may not be replaced."""
    check_place(folder, flag)
    if not folder.is_dir():
        return
    if folder.is_mount() or str(folder) in _mounts():
        raise InputError(
            f"{flag} {folder}: something is mounted there, so it cannot be renamed. Name a folder inside it."
        )
    if _here().is_relative_to(folder):
        raise InputError(
            f"{flag} {folder}: this is where the command runs, or above it, and it would be replaced. Name a folder inside it."
        )
    if manifest.is_empty(folder):
        return
    if not overwrite:
        raise InputError(
            f"{flag} {folder}: the folder is not empty. Name another, or say --overwrite."
        )
    if foreign := manifest.not_ours(folder):
        raise InputError(
            f"{flag} {folder}: the folder holds {foreign}. Only what we wrote is replaced: move it away, or name another "
            "folder."
        )
    sealed = (p for p in (folder, *folder.rglob("*")) if p.is_dir() and not os.access(p, os.W_OK))
    if shut := next(sealed, None):
        raise InputError(
            f"{flag} {folder}: '{shut}' may not be written to. Change that, or name another."
        )


def check_reads(folder: Path, reads: Iterable[str | Path], flag: str) -> None:
    """Raises InputError where what is read lies in the folder that would be replaced, or is that."""
    there = folder.resolve()
    for each in reads:
        path = Path(os.path.abspath(expanded(each)))
        if there.exists() and path.exists() and path.resolve().is_relative_to(there):
            raise InputError(
                f"{flag} {folder}: '{each}' is there, which is read, and it would be replaced. Name another folder."
            )


def check_room(folder: Path, needed: int, flag: str = "--output") -> None:
    """Raises InputError where a disk has less than ``needed`` bytes left, before hours are spent."""
    parent = next(p for p in (folder, *folder.parents) if p.is_dir())
    left = shutil.disk_usage(parent).free
    if left < needed:
        raise InputError(
            f"{flag} {folder}: {needed / 1e9:.2f} GB will be written, and its disk has {left / 1e9:.2f} GB left. Make room, "
            "or name a folder on another disk."
        )


def hold(place: Path, folder: Path, flag: str) -> Lock:
    """The lock on an output, in a folder beside it, which is made. Raises InputError."""
    for tries in range(100):
        try:
            place.mkdir(exist_ok=True, parents=True)
            if place.is_symlink() or not set(os.listdir(place)) <= OURS:
                raise InputError(
                    f"{flag} {folder}: '{place}' is in the way, and we did not make it. Move it, or name another folder."
                )
            return Lock(place / LOCK)
        except Taken:
            raise InputError(
                f"{flag} {folder}: another process is writing there. Wait for it, or name another folder."
            ) from None
        except OSError as e:
            if isinstance(e, FileNotFoundError) and tries < 99:
                continue  # another process has just let go of it
            raise InputError(
                f"{flag} {folder}: '{folder.parent}' cannot be written to ({e.strerror}). Name a folder that can."
            ) from None
    raise AssertionError("unreachable")


def restore(place: Path, folder: Path) -> None:
    """Bring back the folder that a killed process had moved aside, and clear what else it left."""
    if (place / OLD).is_dir() and not folder.exists():
        os.replace(place / OLD, folder)
    for name in (NEW, OLD):
        shutil.rmtree(place / name, ignore_errors=True)


def missing_parents(folder: Path) -> list[Path]:
    """The folders above one that are not there yet, the deepest first."""
    return [p for p in folder.parents if not p.exists()]


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove folders that we have made and that nothing came into."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _here() -> Path:
    try:
        return Path.cwd()
    except FileNotFoundError:  # it was removed under our feet
        return Path("/")


def _free(folder: Path) -> Path:
    n = 2
    while (found := folder.with_name(f"{folder.name[:200]}-{n}")).exists():
        n += 1
    return found


def _mounts() -> frozenset[str]:
    """Where anything is mounted, folders of the same disk too, which `os.path.ismount` does not see (Linux)."""
    try:
        lines = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return frozenset()
    escaped = (line.split(" ")[4] for line in lines)
    return frozenset(
        e.replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\") for e in escaped
    )
