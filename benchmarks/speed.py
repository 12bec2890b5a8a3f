"""Prefill and decode of checkpoints side by side, in one process, in turn; medians and spread.

    python benchmarks/speed.py packaged:smollm2-135m-instruct runs/best-80/model runs/best-70/model

The first model is the reference. Prefill: one sequence of --prompt tokens. Decode: --new tokens, one at a time with the
KV cache, behind a prompt of 16, at each batch size. `promised` is the ratio of FLOPs per token of the reference to the
model's, scores of attention left out, so `of promise` = speed-up / promised.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from statistics import median

import torch
from transformers import PreTrainedModel

from invariance.checkpoint import layout_of_config
from invariance.models import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    models = {name: load_model(name) for name in args.models}
    works: dict[str, Callable[[PreTrainedModel], None]] = {"prefill": lambda m: prefill(m, args.prompt)}
    for size in args.batches:
        works[f"decode, batch {size}"] = lambda m, size=size: decode(m, size, args.new)
    times: dict[str, dict[str, list[float]]] = {w: {n: [] for n in models} for w in works}
    for n in range(args.repeats + 1):
        for what, work in works.items():
            for name, model in models.items():
                start = time.perf_counter()
                work(model)
                if n:  # the first round warms up
                    times[what][name].append(time.perf_counter() - start)
    flops = {name: layout_of_config(m.config).flops({}) for name, m in models.items()}
    first = args.models[0]
    rows = []
    for what, found in times.items():
        for name, seconds in found.items():
            row = {"what": what, "model": name, "median": median(seconds), "min": min(seconds),
                   "max": max(seconds), "speed-up": median(found[first]) / median(seconds)}  # fmt: skip
            if what == "prefill":
                row["promised"] = flops[first] / flops[name]
                row["of promise"] = row["speed-up"] / row["promised"]
            rows.append({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
    print(json.dumps(rows, indent=2))


@torch.no_grad()
def prefill(model: PreTrainedModel, length: int) -> None:
    model(input_ids=some(model, 1, length), use_cache=False)


@torch.no_grad()
def decode(model: PreTrainedModel, batch: int, new: int) -> None:
    ids = some(model, batch, 16)
    model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), min_new_tokens=new, max_new_tokens=new,
                   do_sample=False)  # type: ignore[operator]  # fmt: skip


def some(model: PreTrainedModel, batch: int, length: int) -> torch.Tensor:
    return torch.arange(batch * length).remainder(model.config.vocab_size).view(batch, length)


if __name__ == "__main__":
    main()
