"""What a model is worth and what it costs: perplexity, speed, a sample."""

from __future__ import annotations

import math
import sys
import time
from statistics import median

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from .data import Tokens
from .errors import InputError
from .walk import Progress, quiet


@torch.no_grad()
def perplexity(model: PreTrainedModel, tokens: Tokens, batch: int = 8, progress: Progress = quiet,
               what: str = "perplexity") -> float:  # fmt: skip
    """exp of the mean next-token cross-entropy (nats), every window on its own, padding left out; float32 logits."""
    total, count = 0.0, 0
    batches = list(tokens.batches(batch))
    for ids, mask in progress(batches, what, len(batches)):
        ids, mask = ids.to(model.device), mask.to(model.device)
        padded = None if bool(mask.all()) else mask.long()
        logits = model(input_ids=ids, attention_mask=padded, use_cache=False).logits
        for row, target, real in zip(logits[:, :-1], ids[:, 1:], mask[:, 1:] & mask[:, :-1], strict=True):
            total += cross_entropy(row[real].float(), target[real], reduction="sum").item()
            count += int(real.sum())
    mean = total / max(count, 1)
    return math.exp(mean) if not mean >= 700 else math.inf  # of a mean that is not a number: not a number


def check_windows(tokens: Tokens, where: str) -> None:
    """Raises InputError for windows of one token, after which nothing is predicted."""
    if tokens.ids.shape[1] < 2:
        raise InputError(f"{where}: windows of 1 token predict nothing. Give windows of 2 tokens or more.")


def peak_memory() -> int | None:
    """The most bytes that the process held; None where the system does not say."""
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@torch.no_grad()
def tokens_per_second(
    models: dict[str, PreTrainedModel], length: int = 256, repeats: int = 5
) -> dict[str, float]:
    """Prefill throughput of one sequence of ``length`` tokens, the models in turn, medians over ``repeats`` rounds."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for n in range(repeats + 1):
        for name, model in models.items():
            ids = torch.arange(length, device=model.device).remainder(
                model.config.get_text_config().vocab_size
            )[None]
            start = time.perf_counter()
            model(input_ids=ids, use_cache=False)
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            if n:  # the first round warms up
                times[name].append(time.perf_counter() - start)
    return {name: length / median(found) for name, found in times.items()}


@torch.no_grad()
def sample(model: PreTrainedModel, tokenizer: object, prompt: str, tokens: int = 40) -> str:
    """The greedy continuation of a prompt."""
    encoded = tokenizer(prompt, return_tensors="pt").to(model.device)  # type: ignore[operator]
    out = model.generate(**encoded, max_new_tokens=tokens, do_sample=False)  # type: ignore[operator]
    return tokenizer.decode(out[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True)  # type: ignore[attr-defined]
