"""Tiny models on disk with a tiny tokenizer and tokens, for the tests that start from files."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    PreTrainedTokenizerFast,
)

from invariance.cli import commands as cli
from invariance.testing.tiny import WORDS as VOCABULARY
from invariance.testing.tiny import model_of

WORDS = ["The", "people", "of", "the", "United", "States", "are", "many", "and", "free", "."]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    vocabulary = {w: n for n, w in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def save_model(folder: Path, family: str = "llama", **options: Any) -> Path:
    model_of(family, **options).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@contextmanager
def workplace(root: Path, sequences: int) -> Iterator[None]:
    """Within ``root``, with a cache of its own there and tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INVARIANCE_CACHE", str(root / "cache"))
        patch.chdir(root)
        save_tokens(root / "tokens.npy", sequences=sequences)
        yield


def save_tokens(path: Path, sequences: int = 16, tokens: int = 16, seed: int = 0) -> Path:
    """Token ids that are not all alike: each sequence prefers some of them."""
    g = np.random.default_rng(seed)
    liked = g.integers(1, VOCABULARY, (sequences, 1, 8))
    ids = np.where(
        g.random((sequences, tokens)) < 0.5,
        g.integers(1, VOCABULARY, (sequences, tokens)),
        liked[:, 0, :][np.arange(sequences)[:, None], g.integers(0, 8, (sequences, tokens))],
    )
    np.save(path, ids)
    return path


def stored_numbers(folder: Path) -> int:
    """How many numbers the safetensors files of a checkpoint hold, indices and the scales of rounded weights left out."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "numpy") as tensors:
            left_out = ("_weight_scale", "_weight_zero_point")
            names = [n for n in tensors.keys() if not n.endswith(left_out)]  # noqa: SIM118
            slices = [tensors.get_slice(n) for n in names]
            total += sum(int(np.prod(s.get_shape())) for s in slices if s.get_dtype() != "I64")
    return total


def overrides(values: Mapping[str, Any]) -> list[str]:
    """The ``--set`` assignments of a mapping."""
    return [f"{key}={value}" for key, value in values.items()]


def invoke(*arguments: object) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of the command line, called in this process."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["invariance", *map(str, arguments)])
        patch.setenv("COLUMNS", "120")
        try:
            cli.main()
        except SystemExit as e:
            status = e.code if isinstance(e.code, int) else int(e.code is not None)
        else:
            status = 0
    return status, out.getvalue(), err.getvalue()


@contextmanager
def types_forgotten() -> Iterator[None]:
    """Types that are registered with transformers inside are forgotten afterwards; the package's own, made once, stay."""
    known: Any = (CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING)
    before = [set(each._extra_content) for each in known]
    yield
    for each, names in zip(known, before, strict=True):
        for key in each._extra_content.keys() - names:
            made = key if isinstance(key, type) else each._extra_content[key]
            if not made.__module__.startswith("invariance."):
                del each._extra_content[key]
