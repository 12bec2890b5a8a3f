"""Text that a model writes: how it begins, that it is the model's own, that it is written once."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from invariance.io import own_text
from invariance.io.data import Amount, Making, load_tokens
from invariance.io.sources import Source
from invariance.io.tokens import Shape

TEMPLATE = (
    "{% for m in messages %}<|im_start|> {{ m.role }} {{ m.content }} <|im_end|> {% endfor %}"
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("INVARIANCE_CACHE", str(tmp_path))
    return tmp_path / "self"


@pytest.fixture(scope="module")
def model():
    made = tiny("llama")
    with torch.no_grad():
        made.get_output_embeddings().weight.mul_(20)  # so that its texts are no plain noise
    return made.float()


@pytest.fixture(scope="module")
def tokenizer(model):
    size = model.config.vocab_size
    words = {w: n for n, w in enumerate(("<|im_start|>", "<|im_end|>", "user"))}
    words |= {f"w{n}": n for n in range(3, size)}
    raw = Tokenizer(models.WordLevel(words, unk_token="w3"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<|im_start|>", eos_token="<|im_end|>"
    )
    made.chat_template = TEMPLATE
    return made


def test_a_third_each_begins_with_start_random_token_and_user_turn(model, tokenizer):
    found = own_text.beginnings(model, tokenizer, 30, seed=0)
    assert found[:10] == [[0]] * 10
    assert found[20:] == [[0, 2]] * 10  # <|im_start|> user
    drawn = [start[1] for start in found[10:20]]
    assert all(len(start) == 2 and start[0] == 0 for start in found[10:20])
    assert len(set(drawn)) > 3 and not set(drawn) & {0, 1}  # no special token
    assert own_text.beginnings(model, tokenizer, 30, seed=0) == found
    assert own_text.beginnings(model, tokenizer, 30, seed=1) != found
    halves = own_text.beginnings(model, None, 4, seed=0)  # without a template or a tokenizer
    assert [len(start) for start in halves] == [1, 1, 2, 2]


def test_cold_text_is_what_the_whole_model_finds_likeliest(model, tokenizer):
    """Batches, starts of several lengths and the cache of keys and values change nothing."""
    starts = own_text.beginnings(model, tokenizer, 9, seed=3)
    ids = own_text.sample(model, starts, 12, seed=0, temperature=1e-4)
    for start, row in zip(starts, ids, strict=True):
        assert row[: len(start)].tolist() == start
        likeliest = model(input_ids=row[None]).logits[0].argmax(-1)
        assert row[len(start) :].tolist() == likeliest[len(start) - 1 : -1].tolist()


def test_tokens_come_as_often_as_the_model_says(model):
    """Of many texts the second token's frequencies are p(second | start), within five standard errors."""
    n = 4000
    ids = own_text.sample(model, [[0]] * n, 2, seed=0)
    p = model(input_ids=torch.tensor([[0]])).logits[0, -1].softmax(-1)
    seen = torch.bincount(ids[:, 1], minlength=len(p)) / n
    assert ((seen - p).abs() <= 5 * (p * (1 - p) / n).sqrt() + 1e-3).all()
    warm = own_text.sample(model, [[0]] * n, 2, seed=0, temperature=10.0)
    flat = (model(input_ids=torch.tensor([[0]])).logits[0, -1] / 10).softmax(-1)
    seen = torch.bincount(warm[:, 1], minlength=len(p)) / n
    assert ((seen - flat).abs() <= 5 * (flat * (1 - flat) / n).sqrt() + 1e-3).all()


def test_text_is_written_once_and_again_for_other_weights_or_another_seed(
    model, tokenizer, cache, monkeypatch
):
    written = []
    sample = own_text.sample
    monkeypatch.setattr(own_text, "sample", lambda *a, **k: written.append(1) or sample(*a, **k))
    shape = Shape(4, 6)
    once, again = (own_text.write(model, tokenizer, shape, 0) for _ in range(2))
    assert torch.equal(once, again) and once.shape == (4, 6) and len(written) == 1
    (file,) = cache.iterdir()
    file.write_bytes(file.read_bytes()[:20])  # cut short: counts as missing
    assert torch.equal(own_text.write(model, tokenizer, shape, 0), once) and len(written) == 2
    assert not torch.equal(own_text.write(model, tokenizer, shape, 1), once)
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)
    own_text.write(model, tokenizer, shape, 0)
    assert len(written) == 4
    with torch.no_grad():
        next(model.parameters()).div_(1.5)


def test_self_is_a_source_alone_and_in_a_mixture_and_splits_differ(model, tokenizer, tmp_path):
    making = Making(0, lambda: model)
    said = {"vocab_size": model.config.vocab_size, "amount": Amount(6, 8), "making": making}
    train, test = (load_tokens("self", tokenizer, split=s, **said) for s in ("train", "test"))
    assert train.ids.shape == (6, 8) and not torch.equal(train.ids, test.ids)
    (tmp_path / "a.txt").write_text("w5 " * 200)
    mixture = (Source(data="self"), Source(data=str(tmp_path / "a.txt"), share=2.0))
    found = load_tokens(mixture, tokenizer, **said)
    assert [o.sequences for o in found.origins] == [2, 4]
    assert sum((row == 5).all().item() for row in found.ids) == 4


def test_progress_is_told_token_by_token(model, tokenizer):
    told = []

    def progress(items, what, total):
        told.append((what, total))
        return items

    own_text.sample(model, [[0], [0, 4], [0]], 7, seed=0, progress=progress)
    assert [total for _, total in told] == [6] and "writes" in told[0][0]
