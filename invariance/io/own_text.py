"""Text that a model writes itself, for whoever has a model and no data to calibrate it on.

As many begin with the start token alone, with a random token behind it, with one that has a letter beyond ASCII, and with
the user's turn of the chat template. Tokens are sampled from the model's own distribution p(next | before)^(1/temperature),
normalised, and nothing is cut from it.
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
from .tokens import Shape, front

FORMAT = "3"  # counts up when the same model and seed write another text
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
    """The first tokens of each text, the kinds one after the other, as many of each.

    The start token alone; behind it, a random token; one with a letter beyond ASCII, behind which a model writes what
    little it has seen of other languages; the user's turn of the chat template. Kinds that a tokenizer lacks are left out.
    """
    turn = user_turn(tokenizer)
    start = _start(model, tokenizer, turn)
    generator = torch.Generator().manual_seed(seed)
    plain, foreign = _words(model, tokenizer)
    kinds = [lambda: [start], lambda: [start, _draw(plain, generator)]]
    if foreign:
        kinds.append(lambda: [start, _draw(foreign, generator)])
    if turn:
        kinds.append(lambda: turn)
    return [kinds[n * len(kinds) // count]() for n in range(count)]


def _draw(tokens: Sequence[int], generator: torch.Generator) -> int:
    return tokens[int(torch.randint(len(tokens), (1,), generator=generator))]


def _words(model: PreTrainedModel, tokenizer: Any | None) -> tuple[Sequence[int], Sequence[int]]:
    """The tokens that are not special, and those of them with a letter beyond ASCII."""
    vocabulary = model.config.get_text_config().vocab_size
    if tokenizer is None:
        return range(vocabulary), []
    special = set(tokenizer.all_special_ids)
    plain = [n for n in range(min(vocabulary, len(tokenizer))) if n not in special]
    texts = tokenizer.batch_decode([[n] for n in plain])
    return plain, [n for n, text in zip(plain, texts, strict=True) if _foreign(text)]


def _foreign(text: str) -> bool:
    return any(c.isalpha() and not c.isascii() for c in text)


def _start(model: PreTrainedModel, tokenizer: Any | None, turn: Sequence[int]) -> int:
    """The token that a text starts with: BOS where the tokenizer puts it in front; else a special token that no turn of a
    chat begins or ends with, since documents are told apart by it; else BOS or EOS."""
    config = model.config.get_text_config()
    told = [config.bos_token_id, config.eos_token_id, 0]
    if tokenizer is not None:
        ends = [tokenizer.bos_token_id, tokenizer.eos_token_id]
        of_chats = {*turn, *ends}
        apart = [n for n in tokenizer.all_special_ids if n not in of_chats] if turn else []
        told = [*front(tokenizer), *apart, *ends, *told]
    found = next(token for token in told if token is not None)
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
