"""Carries requests out on a Ray cluster of this machine: what Ray's native code does to a process stays in this one.

Called with a file of requests, which it replaces by their answers.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import ray

from invariance.core.errors import InputError
from invariance.study.job import Execution, Request
from invariance.study.runners import cluster


def main(file: Path) -> None:
    execution = Execution(threads=1)
    try:
        cluster(execution, "local", cpus=1, gpus=1)
    except InputError as e:
        assert "the cluster has 0 GPUs" in str(e)
    else:
        raise AssertionError("a GPU was promised where there is none")
    requests = [Request(name, tuple(recipes)) for name, recipes in json.loads(file.read_text())]
    answers = list(cluster(execution, "local", cpus=1, gpus=0)(requests))
    file.write_text(json.dumps([asdict(answer) for answer in answers]))
    ray.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
