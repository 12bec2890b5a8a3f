"""A folder that grows in place, as a study's does: what we wrote there before is replaced, nothing else is."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from . import manifest
from .errors import InputError
from .files import write_text
from .outputs import check_place

SCRATCH = ".new."  # begins the names of folders in which products are made


@dataclass(frozen=True)
class Growing:
    """A folder, and the names of the files that are written into it again and again."""

    folder: Path
    products: Sequence[str]
    flag: str = "--output"

    def check(self, new: Iterable[str] = ()) -> None:
        """Raises InputError, with nothing changed, where a file would be replaced that we did not write."""
        check_place(self.folder, self.flag)
        if not self.folder.is_dir() or manifest.is_empty(self.folder):
            return
        made = manifest.read(self.folder)
        if made is None:
            raise InputError(
                f"{self.flag} {self.folder}: the folder holds {manifest.not_ours(self.folder)}. Name another folder."
            )
        for name in sorted({*self.products, *made.files, *new}):
            path = self.folder / name
            if os.path.lexists(path) and not self._ours(path, made.files.get(name, ())):
                raise InputError(
                    f"{self.flag} {self.folder}: '{name}' is not as we wrote it, and it would be replaced. Move it away, or "
                    "name another folder."
                )

    def begin(self) -> None:
        """Make the folder, and say in it that it is ours. Raises InputError as ``check`` does."""
        self.check()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in self.folder.glob(f"{SCRATCH}*"):  # of a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            if manifest.read(self.folder) is None:
                self._note({})
        except OSError as e:
            raise InputError(
                f"{self.flag} {self.folder}: it cannot be written to ({e.strerror}). Name a folder that can."
            ) from None

    @contextmanager
    def filling(self) -> Iterator[Path]:
        """A folder to write products into; they are moved into place, one by one, when the block ends well."""
        with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=self.folder) as scratch:
            yield Path(scratch)
            files = [p for p in Path(scratch).rglob("*") if p.is_file()]
            new = {p.relative_to(scratch).as_posix(): (manifest.sha256(p),) for p in files}
            self.check(new)  # somebody may have edited them meanwhile
            made = manifest.read(self.folder)
            before = {} if made is None else made.files
            self._note(before | {name: (*before.get(name, ()), *new[name]) for name in new})
            for name in new:
                (self.folder / name).parent.mkdir(exist_ok=True)
                os.replace(Path(scratch) / name, self.folder / name)
            self._note(before | new)

    def _note(self, files: dict[str, tuple[str, ...]]) -> None:
        write_text(self.folder / manifest.NAME, manifest.Manifest(files=files).to_text())

    def _ours(self, path: Path, known: Sequence[str]) -> bool:
        return path.is_file() and not path.is_symlink() and manifest.sha256(path) in known
