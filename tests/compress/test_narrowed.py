"""What no stock config says: saved in the family's own class with a record of what is narrower, and read again."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import invoke
from transformers import AutoConfig, AutoModelForCausalLM
from undeclared import (
    IDS,
    differs,
    made,
    model_of,
    recipe,
)

from invariance.compress.derived.plan import derived_plan
from invariance.core.errors import InputError
from invariance.io.layouts import derived_layout
from invariance.io.models import load_model
from invariance.io.narrowed import narrowed
from invariance.measure import bench
from invariance.model.derive.certify import TOLERANCE
from invariance.model.described.whole import double

CHANNELS = {
    "spaces": "mlp",
    "rotate": "permute",
    "select": {"uniform": {"keep": 0.75}},
    "slice": "least_squares",
}
STREAM = {
    "spaces": "residual",
    "rotate": {"pca": {"of": "normed"}},
    "select": {"uniform": {"width": 24}},
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "four times the stream, in the code": ("bloom", CHANNELS),
    "one layer narrower than the other": ("gpt_neox", {**CHANNELS, "spaces": "mlp.0"}),
    "under LayerNorms": ("gpt2", STREAM),
    "under LayerNorms whose gain is the weight plus one": ("nemotron", STREAM),
    "under LayerNorms without weights": ("olmo", STREAM),
    "times the root of the width, in the code": ("gemma", STREAM),
    "no points of the stream": ("rwkv", CHANNELS),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_cut_is_saved_read_again_and_generates(case: str, tmp_path: Path) -> None:
    kind, step = CASES[case]
    found = made(kind, step)
    assert found.certificate.passed and found.error <= TOLERANCE
    assert bool(found.why) == (kind != "rwkv")
    small = narrowed(found.model.float())
    dense = model_of(kind)[0]
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in dense.parameters())
    small.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (
        isinstance(again, type(dense)) and type(again).__name__ == f"Narrowed{type(dense).__name__}"
    )
    with torch.no_grad():
        assert differs(again(IDS[:2]).logits, found.model(IDS[:2]).logits) < 1e-5
        assert differs(again(IDS[:2]).logits, dense(IDS[:2]).logits) > 1e-4
    prompt: dict[str, Any] = {"inputs": IDS[:2, :5], "max_new_tokens": 5, "do_sample": False}
    for c in (False, True):
        written = again.generate(**prompt, use_cache=c)
        assert torch.equal(written, small.generate(**prompt, use_cache=c))


def test_a_record_that_forgets_the_old_width_computes_something_else(tmp_path: Path) -> None:
    small = narrowed(made("gpt2", STREAM).model.float())
    small.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    norms = config["narrowed"]["norms"]
    assert {n["of"] for n in norms.values()} == {32} and {n["weight"] for n in norms.values()} == {
        24
    }
    for norm in norms.values():
        norm["of"] = 24
    (tmp_path / "config.json").write_text(json.dumps(config))
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path)(IDS[:2]).logits
        assert differs(again, small(IDS[:2]).logits) > 1e-3


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("shapes", {"transformer.h.0.mlp.c_fc.weight": [0, 4]}, "narrowed.shapes"),
        ("shapes", {"transformer.h.0.mlp.c_fc.weight": [32, 4000]}, "is no part"),
        ("shapes", {"transformer.h.7.mlp.c_fc.weight": [32, 4]}, "KeyError"),
        ("numbers", {"transformer.h.0.attn": {"forward": 3}}, "no number 'forward'"),
        ("numbers", {"transformer.h.0.attn": {"num_heads": -3}}, "and cannot be -3"),
        ("numbers", {"transformer.h.0.attn": {"num_heads": [1]}}, "and cannot be"),
        ("norms", {"transformer.h.0.ln_9": {}}, "narrowed.norms"),
        ("family", "llama9", "no causal model of type 'llama9'"),
    ],
)
def test_a_damaged_record_is_refused(key: str, value: Any, says: str, tmp_path: Path) -> None:
    small = narrowed(made("gpt2", STREAM).model.float())
    small.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["narrowed"][key] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=says):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(InputError, match=says) as told:
        load_model(str(tmp_path))
    assert str(told.value).count(str(tmp_path)) == 1


@pytest.mark.parametrize("rows", [80, 50])
def test_a_narrowed_model_whose_vocabulary_was_resized_is_read_again(
    rows: int, tmp_path: Path
) -> None:
    small = narrowed(made("gpt2", STREAM).model.float())
    small.resize_token_embeddings(rows)
    small.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = IDS[:2] % 50
    with torch.no_grad():
        logits = again(ids).logits
        assert logits.shape[-1] == rows
        assert differs(logits, small(ids).logits) < 1e-5


def test_a_narrowed_model_is_loaded_checked_and_not_cut_again(tmp_path: Path) -> None:
    small = narrowed(made("gpt2", STREAM).model.float())
    small.save_pretrained(tmp_path)
    again = load_model(str(tmp_path))
    with torch.no_grad():
        assert differs(again(IDS[:2]).logits, small(IDS[:2]).logits) < 1e-5
    with pytest.raises(InputError, match="is cut already"):
        derived_layout(again.config)


def test_a_narrowed_model_is_timed_and_its_training_is_left_to_others(tmp_path: Path) -> None:
    small = narrowed(made("gpt2", STREAM).model.float())
    small.save_pretrained(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(bench.COPIED, "cpu", 2**20)
        patch.setitem(bench.SQUARE, "cpu", 64)
        found = bench.bench([str(tmp_path)], [bench.Workload(1, 8, 3)], 1)
    (costs,), (row,) = found["models"], found["timings"]
    assert costs["parameters"] == sum(p.numel() for p in small.parameters())
    matrices = {n: p for n, p in small.named_parameters() if p.dim() == 2 and "wte" not in n}
    products = sum(p.numel() for n, p in matrices.items() if "wpe" not in n)
    scores = 2 * 32 * 2  # of a token with itself in both layers, where attention is plain products
    assert costs["flops_per_token"] in (2 * products, 2 * (products + scores))
    assert row["decode"]["tokens_per_second"]["median"] > 0
    status, _, err = invoke("recover", tmp_path, "--output", tmp_path / "out", "--device", "cpu")
    assert status == 2 and "transformers.Trainer" in " ".join(err.split())


def test_a_config_without_a_record_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "invariance-narrowed"}))
    with pytest.raises(InputError, match="narrowed"):
        AutoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["gpt2", "gemma"])
def test_where_a_stock_checkpoint_is_asked_for_such_a_cut_is_refused(kind: str) -> None:
    with pytest.raises(InputError, match=r"no stock config says|LayerNorms"):
        made(kind, STREAM, stock=True)


def test_a_copy_in_float64_computes_what_the_model_does() -> None:
    model = model_of("gptj")[
        0
    ]  # one way of attention only: masks for another let it see the future
    config = copy.deepcopy(model.config)
    twin = double(model)
    with torch.no_grad():
        assert differs(twin(IDS[:2]).logits.float(), model(IDS[:2]).logits) < 1e-5
    assert model.config._attn_implementation == config._attn_implementation


def test_a_plan_knows_that_no_config_narrows_a_stream_under_layer_norms() -> None:
    model, layout = model_of("gpt2")
    chart = derived_plan(recipe(STREAM), model.config, layout)
    said = chart.unsaid({"x": 24})
    assert "gives a stream of 24 with norms that divide by 32" in said
    assert not chart.unsaid({"x": 32})


HEADS = {
    "spaces": "heads",
    "rotate": "permute",
    "select": {"uniform": {"keep": 0.5}},
    "slice": "truncate",
}


@pytest.mark.parametrize(
    "kind", ["mixtral", "gpt_neox", "gpt2", "phi3", "qwen2_moe", "deepseek_v2"]
)
def test_a_plan_promises_a_stock_config_where_one_is_written(kind: str) -> None:
    model, layout = model_of(kind)
    found = made(kind, HEADS)
    chart = derived_plan(recipe(HEADS), model.config, layout)
    assert bool(chart.unsaid(found.widths)) == bool(found.why) == kind.startswith("gpt")


def test_an_empty_width_of_heads_is_said_so_that_fewer_of_them_stay_as_wide(tmp_path: Path) -> None:
    assert model_of("mixtral")[0].config.head_dim is None
    found = made("mixtral", HEADS)
    assert found.cut is not None
    said = {c.key.name: c.value for c in found.cut.changes}
    assert said == {"head_dim": 8, "num_attention_heads": 2, "num_key_value_heads": 1}
    small = found.model.float()
    small.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(model_of("mixtral")[0])
    with torch.no_grad():
        assert differs(again(IDS[:2]).logits, small(IDS[:2]).logits) < 1e-5


def test_corrections_that_a_checkpoint_stores_are_no_reason_against_a_stock_config() -> None:
    model = model_of("axk1")[0]
    assert any("correction" in name for name in model.state_dict())
    assert not made("axk1", HEADS).why


def test_where_no_config_that_is_tried_computes_the_same_a_record_says_the_cut(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("invariance.model.narrow.certificate.CONFIGS", 1)  # narrower heads
    found = made("mixtral", HEADS)
    assert found.error <= TOLERANCE and found.why
    assert found.cut is not None and not found.cut.changes
