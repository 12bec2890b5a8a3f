"""Windows of token ids: what they hold, where they came from, and how documents are cut into them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from ..core.errors import InputError
from .models import memory

MARGIN = 64  # ids near a cut may differ from those of the whole document
SHOWN = 80  # characters of a source's beginning that the report shows


@dataclass(frozen=True)
class Origin:
    """Where windows came from, for the report."""

    name: str
    data: str
    sequences: int
    tokens: int
    start: str | None  # how the first window begins; None where no tokenizer can tell

    def to_dict(self) -> dict[str, Any]:
        """As the report has it."""
        return dict(self.__dict__)


@dataclass(frozen=True, eq=False)
class Tokens:
    """Token ids in windows of one length; the mask is True where a token is real, not padding."""

    ids: Int64[Tensor, "B T"]
    mask: Bool[Tensor, "B T"]
    origins: tuple[Origin, ...] = ()  # the sources, in the order of the recipe

    @classmethod
    def full(cls, ids: np.ndarray | Tensor, origins: tuple[Origin, ...] = ()) -> Tokens:
        """Windows without padding."""
        found = torch.from_numpy(ids.astype(np.int64)) if isinstance(ids, np.ndarray) else ids
        return cls(found, torch.ones(found.shape, dtype=torch.bool), origins)

    def told(self, name: str, data: str, tokenizer: Any | None) -> Tokens:
        """The same windows, with one source that they came from."""
        start = None
        if tokenizer is not None:
            start = tokenizer.decode(self.ids[0][:SHOWN], skip_special_tokens=True)[:SHOWN]
        origin = Origin(name, data, len(self.ids), int(self.mask.sum()), start)
        return replace(self, origins=(origin,))

    def digest(self) -> str:
        """A hash of the content."""
        digest = hashlib.sha256(f"{tuple(self.ids.shape)}".encode())
        digest.update(memory(self.ids))
        digest.update(memory(self.mask))
        return digest.hexdigest()

    def batches(self, size: int) -> Iterator[tuple[Int64[Tensor, "b T"], Bool[Tensor, "b T"]]]:
        """Ids and masks of ``size`` sequences at a time, in order; the last batch may be smaller."""
        yield from zip(self.ids.split(size), self.mask.split(size), strict=True)


def check_ids(ids: np.ndarray, vocab_size: int, where: str) -> None:
    """Raises InputError for ids that no token of the vocabulary has."""
    for bad, why in (
        (ids < 0, "is negative"),
        (ids >= vocab_size, f"is not below the vocabulary size {vocab_size}"),
    ):
        if bad.any():
            row, column = np.argwhere(bad)[0]
            raise InputError(
                f"{where}: token id {ids[row, column]} (sequence {row}, token {column}) {why}. "
                "Token ids must come from the tokenizer of this model."
            )


@dataclass(frozen=True)
class Shape:
    """How a text is cut: so many windows, so long, one every ``stride`` tokens (None: no overlap)."""

    sequences: int
    tokens: int
    stride: int | None = None


def front(tokenizer: Any) -> list[int]:
    """What the tokenizer puts in front of every text: the BOS token, or nothing."""
    first = tokenizer("x", verbose=False).input_ids[:1]
    return list(first) if first and first[0] == tokenizer.bos_token_id else []


def windows(documents: Iterable[str], tokenizer: Any, shape: Shape, where: str) -> np.ndarray:
    """The leading windows of documents joined by the EOS token. Raises InputError if they are too short."""
    found, there = available(documents, tokenizer, shape, where)
    if len(found) < shape.sequences:
        fit = len(found)
        needed = _needed(shape, shape.tokens - len(front(tokenizer)))
        remedy = f"Ask for sequences: {fit}" if fit else "Ask for fewer tokens"
        raise InputError(
            f"{where}: {there} tokens there, {needed} needed for {shape.sequences} sequences of "
            f"{shape.tokens}. {remedy}, or give more text."
        )
    return found


def _needed(shape: Shape, width: int) -> int:
    return (shape.sequences - 1) * (shape.stride or width) + width


def available(
    documents: Iterable[str], tokenizer: Any, shape: Shape, where: str
) -> tuple[np.ndarray, int]:
    """As many leading windows as there are, at most ``shape.sequences``, and how many tokens were read."""
    start = front(tokenizer)
    width = shape.tokens - len(start)
    if width < 1:
        raise InputError(
            f"{where}: windows of {shape.tokens} token hold a BOS token only. Ask for tokens: 2 or more."
        )
    step = width if shape.stride is None else shape.stride
    if step > width:
        raise InputError(
            f"{where}: stride {step} skips tokens between windows of {width}. Give {width} at most."
        )
    needed = _needed(shape, width)
    stream: list[int] = []
    for document in documents:
        if not document.strip():
            continue
        if stream and tokenizer.eos_token_id is not None:
            stream.append(tokenizer.eos_token_id)
        stream += _encode(tokenizer, document, needed - len(stream))
        if len(stream) >= needed:
            break
    if len(stream) < width:
        return np.empty((0, shape.tokens), dtype=np.int64), len(stream)
    cut = np.lib.stride_tricks.sliding_window_view(np.array(stream[:needed]), width)[::step]
    bos = np.full((len(cut), len(start)), tokenizer.bos_token_id or 0, dtype=np.int64)
    return np.hstack([bos, cut]), len(stream)


def _encode(tokenizer: Any, document: str, needed: int) -> list[int]:
    """All ids of a document, or at least as many as needed: a long one is tokenized no further than that."""
    head = document[: 16 * (needed + MARGIN)]
    ids = tokenizer(head, add_special_tokens=False, verbose=False).input_ids
    if len(head) < len(document) and len(ids) < needed + MARGIN:
        ids = tokenizer(document, add_special_tokens=False, verbose=False).input_ids
    return list(ids)
