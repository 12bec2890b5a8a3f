"""What is read of small models: the same as was written by hand for seven families, and refusals by what is computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from declared import FAMILIES
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.initialization import no_init_weights

from invariance.core.errors import InputError
from invariance.io.skeleton import parameters_on_meta
from invariance.model.architecture import Architecture
from invariance.model.declare import kept
from invariance.model.declare.proof import prove
from invariance.model.declare.small import small_model, small_values
from invariance.model.declare.whole import architecture_of
from invariance.model.families import architecture, declared, known, positions
from invariance.model.tiny import Tiny


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_is_read_is_what_was_declared(kind: str) -> None:
    assert known(AutoConfig.for_model(kind)) == FAMILIES[kind]


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("starcoder2", {}),
        ("gemma", {}),
        ("granite", {}),
        ("seed_oss", {}),
        ("llama", {"hidden_act": "relu2", "attention_bias": True, "mlp_bias": True}),
        ("llama", {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 3}),
        ("phi", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.4}}),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "short_factor": [1.0] * 64,
                    "long_factor": [2.0] * 64,
                    "factor": 4.0,
                    "original_max_position_embeddings": 512,
                }
            },
        ),
    ],
)
def test_other_types_and_other_configs_are_spoken_of(kind: str, values: dict[str, Any]) -> None:
    found = known(AutoConfig.for_model(kind, **values))
    assert isinstance(found, Architecture), found


REFUSED: Mapping[tuple[str, str], str] = {
    ("granite", "residual_multiplier"): r"not the sum of the stream before .*multipliers",
    ("granite", "embedding_multiplier"): "does not begin with the sum of the rows of its tables",
    ("olmo2", ""): "no norm stands in front of 'self_attn'",
    ("gpt_neox", ""): "two norms, .*, read one point of its stream",
    ("gemma2", ""): "gives other logits",
    ("ministral3", ""): r"at \d+ positions, .*gives other logits",
    ("cohere", ""): "norm",
    ("smollm3", ""): "gives other logits",
    (
        "gpt2",
        "",
    ): "what reads the norm 'ln_1'.* is neither an attention nor an MLP of plain linear layers",
    ("mixtral", ""): r"reads the norm 'post_attention_layernorm' \('mlp'\) is neither",
    ("qwen3_moe", ""): r"reads the norm 'post_attention_layernorm' \('mlp'\) is neither",
}


@pytest.mark.parametrize(("kind", "key"), REFUSED)
def test_what_is_refused_is_told_by_what_it_computes(kind: str, key: str) -> None:
    config = AutoConfig.for_model(kind, **({key: 0.5} if key else {}))
    assert not declared(config)
    with pytest.raises(InputError, match=rf"'{kind}'.*{REFUSED[kind, key]}"):
        architecture(config)


def made(kind: str = "llama", **values: Any) -> Tiny:
    return small_model(kind, small_values(AutoConfig.for_model(kind, **values)))


def hooked(path: str, change: Callable[[Any], Any]) -> Callable[[nn.Module], None]:
    def fault(model: nn.Module) -> None:
        hook: Any = lambda module, args, output: change(output)  # noqa: E731
        model.get_submodule(path).register_forward_hook(hook)

    return fault


def first(change: Callable[[Tensor], Tensor]) -> Callable[[Any], Any]:
    return lambda out: (change(out[0]), *out[1:])


FAULTS: Mapping[str, tuple[Callable[[nn.Module], None], str]] = {
    "a multiplier in a branch": (
        hooked("model.layers.0.mlp", lambda out: 0.5 * out),
        "not the sum of the stream",
    ),
    "a multiplier behind attention": (
        hooked("model.layers.1.self_attn", first(lambda out: 2 * out)),
        "not the sum of the stream",
    ),
    "a table that multiplies by 3": (
        hooked("model.embed_tokens", lambda out: 3 * out),
        "multiplies what it looks up by 3",
    ),
    "queries that are clipped": (
        hooked("model.layers.0.self_attn.q_proj", lambda out: out.clamp(-3, 3)),
        "gives other logits",
    ),
    "a cap that shows when signals are loud": (
        hooked("model.layers.0.self_attn.v_proj", lambda out: out.clamp(-40, 40)),
        "gives other logits",
    ),
    "something between norm and head": (
        hooked("model.norm", lambda out: out + 1),
        "no norm",
    ),
    "a stream that is scaled between layers": (
        hooked("model.layers.0", lambda out: 2 * out),
        "not the sum of the stream",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_model_that_computes_more_than_it_seems_to_is_refused(fault: str) -> None:
    small = made()
    change, why = FAULTS[fault]
    change(small.model)
    with pytest.raises(InputError, match=why):
        prove(small, architecture_of(small))


def test_weights_without_a_place_are_named() -> None:
    small = made()
    block: Any = small.model.get_submodule("model.layers.1")
    block.extra = nn.Linear(2, 2).double()
    with pytest.raises(
        InputError, match=r"without a place in the grammar: 'model\.layers\.1\.extra'"
    ):
        architecture_of(small)


def test_sizes_say_nothing() -> None:
    one = AutoConfig.for_model("llama", hidden_size=16, num_attention_heads=2, head_dim=6)
    other = AutoConfig.for_model("llama", hidden_size=8192, intermediate_size=9, vocab_size=5)
    assert small_values(one) == small_values(other)
    assert small_values(one) != small_values(AutoConfig.for_model("llama", hidden_act="relu"))


@pytest.mark.parametrize("kind", ["opt", "olmo2"])
def test_what_was_read_is_kept(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INVARIANCE_CACHE", str(tmp_path))
    kept._read.cache_clear()
    config = AutoConfig.for_model(kind)
    found = known(config)
    kept._read.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(kept, "_tried", None)
        assert known(config) == found
    for path in tmp_path.rglob("*.grammar.json"):
        path.write_text("damaged")
    kept._read.cache_clear()
    assert known(config) == found


def test_models_are_read_without_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INVARIANCE_CACHE", "/dev/null/no")
    kept._read.cache_clear()
    assert declared(AutoConfig.for_model("llama"))


def test_reading_disturbs_nothing_and_is_not_disturbed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INVARIANCE_CACHE", str(tmp_path))
    kept._read.cache_clear()
    config, before = AutoConfig.for_model("llama"), torch.get_rng_state()
    with torch.device("meta"), parameters_on_meta(), no_init_weights():
        assert known(config) == FAMILIES["llama"]
        assert nn.Linear(2, 2).weight.is_meta
    assert torch.equal(torch.get_rng_state(), before)


def test_plain_data_and_back() -> None:
    for arch in FAMILIES.values():
        assert kept.from_plain(asdict(arch)) == arch


def test_positions_end_where_a_table_of_them_does() -> None:
    assert positions(AutoConfig.for_model("opt", max_position_embeddings=77)) == 77
    assert positions(AutoConfig.for_model("llama", max_position_embeddings=77)) is None
