"""What models cost: parameters, FLOPs, bytes and memory, and measured speed, in turn and against the machine's roof."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from ..core.errors import InvarianceError
from ..core.progress import Progress, quiet
from ..io.models import is_rounded, load_model, stored_bytes
from .costs import Costs, counted, forward

COPIED, SQUARE = (
    {"cpu": 2**28, "cuda": 2**30},
    {"cpu": 2048, "cuda": 8192},
)  # bytes; rows of a matrix
T = TypeVar("T")


@dataclass(frozen=True)
class Spread:
    """A median with its quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        low, middle, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
        return cls(middle, low, high)


@dataclass(frozen=True)
class Machine:
    """What the machine does at best, measured: copying memory, and multiplying large matrices."""

    name: str
    bytes_per_second: float
    flops_per_second: float

    @property
    def ridge(self) -> float:
        """The FLOPs per byte from which on a computation is bound by arithmetic, not by memory."""
        return self.flops_per_second / self.bytes_per_second


@dataclass(frozen=True)
class Work:
    """How much a phase computes and moves, and what the machine's roof makes of it."""

    flops: float
    bytes: float

    def seconds(self, machine: Machine) -> float:
        """The least time it could take."""
        return max(self.flops / machine.flops_per_second, self.bytes / machine.bytes_per_second)

    def bound(self, machine: Machine) -> str:
        return "compute" if self.flops / self.bytes > machine.ridge else "memory"


@dataclass(frozen=True)
class Workload:
    """So many sequences at once, with prompts of so many tokens, and how many tokens are added to each."""

    batch: int
    prompt: int
    new: int  # two at least

    def first_token(self, costs: Costs, itemsize: int) -> Work:
        """All tokens pass the blocks, the last ones the head; the cache is written. Attention scores are left out."""
        tokens, each = self.batch * self.prompt, costs.flops
        flops = tokens * (each - costs.head_flops) + self.batch * costs.head_flops
        return Work(flops, itemsize * (each / 2 + tokens * costs.kv_entries))

    def step(self, costs: Costs, itemsize: int) -> Work:
        """One token of each sequence, halfway: every matrix is read, and the cache so far."""
        cached = self.batch * (self.prompt + self.new / 2) * costs.kv_entries
        return Work(self.batch * costs.flops, itemsize * (costs.flops / 2 + cached))


def bench(
    names: Sequence[str],
    workloads: Sequence[Workload],
    repeats: int,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Costs and speed of models, the first of which is the reference. Raises InputError."""
    models = {
        n: load_model(n, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        for n in names
    }
    per_token = {name: counted(model, name) for name, model in models.items()}
    largest = max(workloads, key=lambda w: (w.batch * w.prompt, w.new))
    found = []
    for name, costs in progress(list(per_token.items()), "peak memory", len(per_token)):
        found.append(
            {
                "name": name,
                "rounded": is_rounded(name, trust_remote_code=trust_remote_code),
                "parameters": sum(p.numel() for p in models[name].parameters()),
                "flops_per_token": costs.flops,
                "kv_bytes_per_token": dtype.itemsize * costs.kv_entries,
                "file_bytes": stored_bytes(name),
                "peak_memory_bytes": peak_of(name, largest, device, dtype, trust_remote_code),
            }
        )
    machine = measured(device, dtype)
    return {
        "machine": {**vars(machine), "ridge": machine.ridge, "threads": torch.get_num_threads()},
        "dtype": str(dtype).removeprefix("torch."),
        "rounds": repeats,
        "models": found,
        "timings": [
            row
            for workload in workloads
            for row in timings(models, per_token, workload, machine, repeats, progress)
        ],
    }


def timings(
    models: Mapping[str, PreTrainedModel],
    costs: Mapping[str, Costs],
    workload: Workload,
    machine: Machine,
    repeats: int,
    progress: Progress,
) -> list[dict[str, Any]]:
    """One row a model: seconds to the first token, tokens per second after it, and both against the first model."""
    what = f"batch {workload.batch}, prompt {workload.prompt}"
    found = interleaved(models, lambda m: generate(m, workload), repeats, progress, what)
    reference = next(iter(models))
    rows = []
    for name, rounds in found.items():
        itemsize = models[name].dtype.itemsize
        row: dict[str, Any] = {
            "name": name,
            "batch": workload.batch,
            "prompt": workload.prompt,
            "new": workload.new,
        }
        for n, (phase, work) in enumerate(
            {"first_token": Workload.first_token, "decode": Workload.step}.items()
        ):
            seconds = [r[n] for r in rounds]
            least, base = (
                work(workload, costs[m], itemsize).seconds(machine) for m in (name, reference)
            )
            speed_up = [r[n] / s for r, s in zip(found[reference], seconds, strict=True)]
            row[phase] = {
                "seconds": vars(Spread.of(seconds)),
                "tokens_per_second": vars(
                    Spread.of([_tokens(workload, phase) / s for s in seconds])
                ),
                "speed_up": vars(Spread.of(speed_up)),
                "promised_speed_up": base / least,
                "bound": work(workload, costs[name], itemsize).bound(machine),
                "of_roof": least / float(np.median(seconds)),
            }
        rows.append(row)
    return rows


def _tokens(workload: Workload, phase: str) -> int:
    """How many tokens the seconds of a phase are about: of decoding, those of one step."""
    return workload.batch * (workload.prompt if phase == "first_token" else 1)


def interleaved(
    models: Mapping[str, PreTrainedModel],
    work: Callable[[PreTrainedModel], T],
    repeats: int,
    progress: Progress = quiet,
    what: str = "timing",
) -> dict[str, list[T]]:
    """What a measurement finds in each round, the models in turn, so that a busy machine is unfair to none."""
    found: dict[str, list[T]] = {name: [] for name in models}
    for n in progress(range(repeats + 1), what, repeats + 1):
        for name, model in models.items():
            result = work(model)
            if n:  # the first round warms up
                found[name].append(result)
    return found


@torch.no_grad()
def generate(model: PreTrainedModel, workload: Workload) -> tuple[float, float]:
    """Seconds from prompts to the first token of each, and seconds per token after that, likeliest tokens taken."""
    cache = DynamicCache(config=model.config.get_text_config())

    def step(ids: torch.Tensor) -> torch.Tensor:
        next_ids: torch.Tensor = forward(model, ids, cache).logits[:, -1:].argmax(-1)
        return next_ids

    ids, start = _some(model, workload.batch, workload.prompt), _now(model)
    ids = step(ids)
    first = _now(model)
    for _ in range(workload.new - 1):
        ids = step(ids)
    return first - start, (_now(model) - first) / (workload.new - 1)


def tokens_per_second(
    models: Mapping[str, PreTrainedModel], length: int = 256, repeats: int = 5
) -> dict[str, float]:
    """Throughput of one sequence of ``length`` tokens with all logits, medians over ``repeats`` rounds in turn."""

    @torch.no_grad()
    def prefill(model: PreTrainedModel) -> float:
        ids, start = _some(model, 1, length), _now(model)
        model(input_ids=ids, use_cache=False)
        return _now(model) - start

    found = interleaved(models, prefill, repeats)
    return {name: length / Spread.of(seconds).median for name, seconds in found.items()}


def _some(model: PreTrainedModel, batch: int, length: int) -> torch.Tensor:
    vocabulary = model.config.get_text_config().vocab_size
    return (
        torch.arange(batch * length, device=model.device).remainder(vocabulary).view(batch, length)
    )


def _now(model: PreTrainedModel) -> float:
    """The time when all that was asked of the model's device is done."""
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measured(device: str, dtype: torch.dtype, repeats: int = 5) -> Machine:
    """Bandwidth of a large copy, read and written, and the rate of a large product, medians."""
    source = torch.ones(COPIED[device], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a = torch.randn(SQUARE[device], SQUARE[device], device=device).to(dtype)

    def seconds(work: Callable[[], object]) -> float:
        taken = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            work()
            if device == "cuda":
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - start)
        return float(np.median(taken[1:]))

    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU ({platform.machine()})"
    copied, product = seconds(lambda: target.copy_(source)), seconds(lambda: a @ a)
    return Machine(name, 2 * COPIED[device] / copied, 2 * SQUARE[device] ** 3 / product)


def peak_of(
    name: str, workload: Workload, device: str, dtype: torch.dtype, trust_remote_code: bool
) -> int:
    """The most memory that loading a model and generating with it takes, in a process of its own."""
    asked = {
        "model": name,
        **vars(workload),
        "device": device,
        "dtype": str(dtype).removeprefix("torch."),
        "trust_remote_code": trust_remote_code,
    }
    command = [sys.executable, "-m", "invariance.measure.bench_memory", json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise InvarianceError(f"{name}: the process that measures its memory failed: {last}")
    return int(done.stdout.strip().splitlines()[-1])
