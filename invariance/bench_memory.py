"""Peak memory of one model, measured in this process and printed: what ``bench`` starts, once a model."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import torch

from .bench import Setting, generate
from .evaluate import peak_memory
from .models import load_model

STATUS = Path("/proc/self/status")  # of Linux, where a child's rusage begins with what its parent held


def resident() -> int:
    """The most bytes that this process held so far."""
    if STATUS.exists():
        found = re.search(r"VmHWM:\s*(\d+) kB", STATUS.read_text())
        if found:
            return 1024 * int(found[1])
    return peak_memory() or 0


def main() -> None:
    asked = json.loads(sys.argv[1])
    cuda = asked["device"] == "cuda"
    before = 0 if cuda else resident()
    model = load_model(asked["model"], dtype=getattr(torch, asked["dtype"]), device=asked["device"],
                       trust_remote_code=asked["trust_remote_code"])  # fmt: skip
    generate(model, Setting(asked["batch"], asked["prompt"], asked["new"]))
    print((torch.cuda.max_memory_allocated() if cuda else resident()) - before)


if __name__ == "__main__":
    main()
