"""Text that a model writes itself, for whoever has a model and no data to calibrate it on.

A third each begins with the start token, with a random token, and with the user's turn of the chat template. Tokens are
sampled from the model's own distribution p(next | before)^(1/temperature), normalised, and nothing is cut from it.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int64
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..core.cache import cache_dir
from ..core.files import write_tensors
from ..core.progress import Progress, quiet
from .models import weights_digest
from .tokens import Shape

FORMAT = "2"  # counts up when the same model and seed write another text
BATCH = 64  # texts that are written side by side; other sizes would draw other numbers
MARK = "\N{OBJECT REPLACEMENT CHARACTER}"  # stands for what the user says


def write(
    model: PreTrainedModel,
    tokenizer: Any | None,
    shape: Shape,
    seed: int,
    progress: Progress = quiet,
    temperature: float = 1.0,
) -> Int64[Tensor, "B T"]:
    """Windows that the model writes, from the cache where it wrote them before.

    They hang on the weights, the config, the seed, the shape, the device and the dtype that is fastest there: in
    another, rounding differs.
    """
    starts = beginnings(model, tokenizer, shape.sequences, seed)
    told = [FORMAT, weights_digest(model), model.config.to_json_string(use_diff=False)]
    dtype = fastest(model.device)
    told += [str(dtype), model.device.type, str(seed), str(temperature), str(shape.tokens)]
    key = hashlib.sha256(repr((told, starts)).encode()).hexdigest()[:32]
    path = cache_dir("self") / f"{key}.safetensors"
    try:
        return load_file(path)["ids"]
    except (OSError, SafetensorError):  # not there yet, or cut short
        twin = model if model.dtype is dtype else in_dtype(dtype, model)
        made = sample(twin, starts, shape.tokens, seed, progress, temperature)
        write_tensors(path, {"ids": made})
        return made


def beginnings(
    model: PreTrainedModel, tokenizer: Any | None, count: int, seed: int
) -> list[list[int]]:
    """The first tokens of each text, the three kinds one after the other."""
    bos, vocabulary = _start(model, tokenizer), model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(seed)
    special = set() if tokenizer is None else set(tokenizer.all_special_ids)
    size = vocabulary if tokenizer is None else min(vocabulary, len(tokenizer))
    plain = [n for n in range(size) if n not in special]
    drawn = torch.randint(len(plain), (count,), generator=generator).tolist()
    turn = user_turn(tokenizer)
    kinds: list[list[int] | None] = [[bos], None] + ([turn] if turn else [])
    found = []
    for n in range(count):
        start = kinds[n * len(kinds) // count]
        found.append(start if start is not None else [bos, plain[drawn[n]]])
    return found


def _start(model: PreTrainedModel, tokenizer: Any | None) -> int:
    """The token that a text starts with: BOS, or where there is none, EOS, behind which another text begins."""
    config = model.config.get_text_config()
    asked = [] if tokenizer is None else [tokenizer.bos_token_id, tokenizer.eos_token_id]
    asked += [config.bos_token_id, config.eos_token_id, 0]
    found = next(token for token in asked if token is not None)
    return int(found[0] if isinstance(found, list | tuple) else found)


def user_turn(tokenizer: Any | None) -> list[int]:
    """The tokens of the chat template up to what the user says; none without a template."""
    if tokenizer is None or not tokenizer.chat_template:
        return []
    said = [{"role": "user", "content": MARK}]
    text = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=False)
    return list(tokenizer(text.split(MARK)[0], add_special_tokens=False).input_ids)


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    starts: Sequence[Sequence[int]],
    length: int,
    seed: int,
    progress: Progress = quiet,
    temperature: float = 1.0,
) -> Int64[Tensor, "B T"]:
    """Each start, continued to ``length`` tokens; texts run side by side with a cache of keys and values, and where one's
    start is longer, its tokens stand in place of those drawn. What follows an end token is another text, as in the text
    that models are trained on."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.empty(len(starts), length, dtype=torch.int64)
    for rows in torch.arange(len(starts)).split(BATCH):
        given = [starts[n] for n in rows.tolist()]
        ids = torch.tensor([start[0] for start in given])
        made[rows, 0] = ids
        cache: Any = None
        steps = range(1, length)
        for at in progress(steps, f"text that the model writes ({len(rows)})", len(steps)):
            seen = ids[:, None].to(model.device)
            out = model(input_ids=seen, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            p = (out.logits[:, -1].float() / temperature).softmax(-1).cpu()
            ids = torch.multinomial(p, 1, generator=generator)[:, 0]
            for n, start in enumerate(given):
                if at < len(start):
                    ids[n] = start[at]
            made[rows, at] = ids
    return made


def in_dtype(dtype: torch.dtype, model: PreTrainedModel) -> PreTrainedModel:
    """The model with its weights in a dtype; buffers, from which positions are computed, stay as they are."""
    weights = {id(p): nn.Parameter(p.detach().to(dtype), False) for p in model.parameters()}
    return copy.deepcopy(model, weights)  # type: ignore[arg-type]


def fastest(device: torch.device) -> torch.dtype:
    """The dtype in which a device multiplies fastest: bfloat16 where it has units for it, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32
