"""From one source or a mixture of several to windows of tokens.

A single source is read from its start, and nothing is shuffled. A mixture takes a share of its windows from each
source: documents and windows are drawn by the seed, so that a source shows more than its beginning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from ..core.errors import InputError
from ..core.paths import expanded
from ..core.progress import Progress, quiet
from ..model.families import check_positions, declared
from .arrays import open_array
from .documents import FORMS, documents
from .own_text import write
from .sources import SELF, Source
from .tokens import Origin, Shape, Tokens, available, check_ids, windows

__all__ = ["DEFAULT_SEQUENCES", "DEFAULT_TOKENS", "Amount", "Making", "Tokens", "load_tokens"]

DEFAULT_SEQUENCES, DEFAULT_TOKENS = 64, 512  # of text; token ids in a file are all taken
POOL = 8  # a mixture draws its windows from so many times as many
DRAWN = 4096  # documents of a source are drawn from so many, its first


@dataclass(frozen=True)
class Making:
    """What is needed where windows are drawn, and where the model writes them itself."""

    seed: int = 0
    model: Callable[[], PreTrainedModel] | None = None  # asked for only where it writes
    progress: Progress = quiet


@dataclass(frozen=True)
class Amount:
    """How much of a data set is asked for; None for all of an array, and for what text comes in by default."""

    sequences: int | None = None
    tokens: int | None = None
    stride: int | None = None  # from one window of a text to the next; None for no overlap


@dataclass(frozen=True)
class _Reading:
    """What all sources of a data set are read with."""

    tokenizer: Any | None
    split: str
    where: str
    making: Making

    def text(self, source: str) -> str:
        """Where a text stands, for messages."""
        return f"{self.where}: {source}, split '{self.split}'"


def load_tokens(
    data: str | Sequence[Source],
    tokenizer: Any | None,
    *,
    vocab_size: int,
    split: str = "train",
    amount: Amount = Amount(),
    where: str = "data",
    making: Making = Making(),
) -> Tokens:
    """Windows of a data set, sequences × tokens ids, as many as the ``amount`` says. Raises InputError.

    Token ids (``.npy``) are taken as they are, all of them unless told otherwise. Text is tokenized, its
    documents joined by the tokenizer's end-of-sequence token if it has one, and cut into windows, one every
    ``amount.stride`` tokens, by default without overlap; each starts with the beginning-of-sequence token if the tokenizer
    puts one in front of a text. ``self`` is text that the model writes.
    ``split`` chooses among the splits of a packaged text or of a hub dataset; a file has but one.
    """
    for name, value in (("sequences", amount.sequences), ("tokens", amount.tokens)):
        if value is not None and value < 1:
            raise InputError(f"{where}: {name}: {value} is no number of {name}. Give 1 or more.")
    reading = _Reading(tokenizer, split, where, making)
    if isinstance(data, str):
        ids = _single(data, reading, amount)
        check_ids(ids, vocab_size, f"{where}: {data}")
        return Tokens.full(ids).told(data, data, tokenizer)
    if amount.stride is not None:
        raise InputError(
            f"{where}: stride {amount.stride}: the windows of a mixture are drawn one by one. "
            "Remove `stride`, or give one source."
        )
    return _mixture(data, reading, _shape(amount), vocab_size)


def _shape(amount: Amount) -> Shape:
    """Of windows of text."""
    sequences, tokens = amount.sequences or DEFAULT_SEQUENCES, amount.tokens or DEFAULT_TOKENS
    return Shape(sequences, tokens, amount.stride)


def _single(data: str, reading: _Reading, amount: Amount) -> np.ndarray:
    where = reading.where
    if data.endswith(".npy"):
        if amount.stride is not None:
            raise InputError(
                f"{where}: stride {amount.stride}: the rows of an .npy are windows already. Remove `stride`, or give text."
            )
        return _array(expanded(data, where), amount.sequences, amount.tokens, where)
    shape = _shape(amount)
    if data == SELF:
        return _own(reading, shape)
    found = documents(data, reading.split, where, reading.tokenizer)
    return windows(found, _tokenizer(data, reading), shape, reading.text(data))


def _own(reading: _Reading, shape: Shape) -> np.ndarray:
    making, where = reading.making, reading.where
    if making.model is None:
        raise InputError(
            f"{where}: {SELF}: there is no model here that could write text. Name another source."
        )
    if shape.stride is not None:
        raise InputError(
            f"{where}: stride {shape.stride}: each text of {SELF} is one window. Remove `stride`."
        )
    model = making.model()
    config = model.config.get_text_config()
    if declared(config):
        check_positions(config, shape.tokens, where)
    seed = 2 * making.seed + (reading.split == "test")  # what is measured is not what calibrated
    return write(model, reading.tokenizer, shape, seed, making.progress).numpy()


def _tokenizer(data: str, reading: _Reading) -> Any:
    if reading.tokenizer is None:
        raise InputError(
            f"{reading.where}: {data} is text, and the model comes without a tokenizer. "
            "Give token ids in an .npy file, or save the tokenizer beside the model."
        )
    return reading.tokenizer


def _mixture(mixture: Sequence[Source], reading: _Reading, shape: Shape, vocab_size: int) -> Tokens:
    """A share of the windows from each source, all in an order that the seed fixes."""
    rng = np.random.default_rng([reading.making.seed, 1])
    parts: list[Any] = []
    origins: list[Origin] = []
    for n, (source, count) in enumerate(
        zip(mixture, _counts(mixture, shape, reading), strict=True)
    ):
        own = replace(reading, split=source.split or reading.split, where=f"{reading.where}[{n}]")
        ids = _drawn(source.data, own, replace(shape, sequences=count), rng)
        check_ids(ids, vocab_size, f"{own.where}: {source.data}")
        found = Tokens.full(ids).told(source.label, source.data, reading.tokenizer)
        parts.append(found.ids)
        origins += found.origins
    whole = torch.cat(parts)
    return Tokens.full(whole[torch.from_numpy(rng.permutation(len(whole)))], tuple(origins))


def _counts(mixture: Sequence[Source], shape: Shape, reading: _Reading) -> list[int]:
    """How many windows each source gives: in proportion to the shares, by largest remainders."""
    total = sum(source.share for source in mixture)
    exact = [shape.sequences * source.share / total for source in mixture]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda n: counts[n] - exact[n])
    for n in by_remainder[: shape.sequences - sum(counts)]:
        counts[n] += 1
    none = next((s for s, count in zip(mixture, counts, strict=True) if not count), None)
    if none is not None:
        raise InputError(
            f"{reading.where}: {shape.sequences} sequences leave none for {none.label}, whose share is "
            f"{none.share / total:.2%}. Ask for more sequences, or for a larger share of it."
        )
    return counts


def _drawn(data: str, reading: _Reading, shape: Shape, rng: np.random.Generator) -> np.ndarray:
    """Windows of one source of a mixture, drawn from a pool that is POOL times as large."""
    if data == SELF:
        return _own(reading, shape)
    if data.endswith(".npy"):
        pool = _array(expanded(data, reading.where), None, shape.tokens, reading.where)
        there = pool.size
    else:
        tokenizer = _tokenizer(data, reading)
        found = list(islice(documents(data, reading.split, reading.where, tokenizer), DRAWN))
        drawn = (found[n] for n in rng.permutation(len(found)))
        wide = replace(shape, sequences=POOL * shape.sequences)
        pool, there = available(drawn, tokenizer, wide, reading.text(data))
    if len(pool) < shape.sequences:
        raise InputError(
            f"{reading.text(data)}: {there} tokens are {len(pool)} windows of {shape.tokens}, and its share is "
            f"{shape.sequences}. Ask for fewer sequences, or for a smaller share of it."
        )
    return pool[rng.choice(len(pool), shape.sequences, replace=False)]


def _array(path: Path, sequences: int | None, tokens: int | None, where: str) -> np.ndarray:
    where = f"{where}: {path}"
    if not path.is_file():
        raise InputError(f"{where}: there is no such file. {FORMS}")
    ids = open_array(path, where)
    if ids.dtype.kind not in "iu" or ids.ndim != 2 or ids.size == 0:
        nan = " with NaN" if ids.dtype.kind == "f" and np.isnan(ids).any() else ""
        there = f"{ids.dtype}{nan} of shape {ids.shape}"
        raise InputError(
            f"{where}: holds {there}. Write integers of shape (sequences, tokens), not empty."
        )
    for name, asked, there in zip(
        ("sequences", "tokens"), (sequences, tokens), ids.shape, strict=True
    ):
        if asked is not None and asked > there:
            raise InputError(
                f"{where}: {asked} {name} asked for, {there} there. Ask for {there} at most."
            )
    return np.asarray(ids[:sequences, :tokens])
