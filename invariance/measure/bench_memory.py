"""Peak memory of one model, measured in this process and printed: what ``bench`` starts, once a model."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from pathlib import Path

import torch

from ..io.models import load_config, load_model
from ..model.described.weightless import on_meta
from .bench import Workload, generate
from .evaluate import peak_memory

STATUS = Path(
    "/proc/self/status"
)  # of Linux, where a child's rusage begins with what its parent held
CLEAR = Path("/proc/self/clear_refs")


def held(key: str) -> int:
    """The bytes that this process holds now (VmRSS), or held at most (VmHWM)."""
    if STATUS.exists():
        found = re.search(rf"{key}:\s*(\d+) kB", STATUS.read_text())
        if found:
            return 1024 * int(found[1])
    return peak_memory() or 0


def forget() -> None:
    """What was held at most begins anew; importing takes more for a moment than it leaves behind."""
    if CLEAR.exists():
        with contextlib.suppress(OSError):
            CLEAR.write_text("5")


def main() -> None:
    asked = json.loads(sys.argv[1])
    cuda = asked["device"] == "cuda"
    on_meta(
        load_config(asked["model"], trust_remote_code=asked["trust_remote_code"])
    )  # imports its family
    forget()
    before = 0 if cuda else held("VmRSS")
    model = load_model(
        asked["model"],
        dtype=getattr(torch, asked["dtype"]),
        device=asked["device"],
        trust_remote_code=asked["trust_remote_code"],
    )
    generate(model, Workload(asked["batch"], asked["prompt"], asked["new"]))
    print((torch.cuda.max_memory_allocated() if cuda else held("VmHWM")) - before)


if __name__ == "__main__":
    main()
