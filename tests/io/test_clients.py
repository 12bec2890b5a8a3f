"""Stock checkpoints in programs that read older keys: the same positions, and a tokenizer that they know."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import save_model, tokenizer
from tiny import tiny
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from invariance.io.clients import OLDER, misread, save_tokenizer
from invariance.model.tiny import tiny as small
from invariance.recipe.recipe import Recipe
from invariance.run.compress import compress
from invariance.run.run import run

IDS = torch.arange(1, 101)[None] % 41
THETA = {"rope_type": "default", "rope_theta": 123.0}
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0},
    **{"high_freq_factor": 4.0, "original_max_position_embeddings": 32},
}
ROPE: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "theta": ("llama", THETA, {"rope_theta": 123.0}),
    "scaled": (
        "llama",
        LLAMA3,
        {
            "rope_theta": 500.0,
            "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"},
        },
    ),
    "mistral": ("mistral", THETA, {"rope_theta": 123.0}),
    "qwen2": ("qwen2", THETA, {"rope_theta": 123.0}),
    "qwen3": ("qwen3", THETA, {"rope_theta": 123.0}),
    "layer types": (
        "gemma3_text",
        {"full_attention": THETA, "sliding_attention": THETA | {"rope_theta": 17.0}},
        {"rope_theta": 123.0, "rope_local_base_freq": 17.0},
    ),
    "partial": (
        "phi",
        THETA | {"partial_rotary_factor": 0.5},
        {"rope_theta": 123.0, "partial_rotary_factor": 0.5},
    ),
    "none": ("opt", {}, {}),
}
LONG = {
    **{"rope_type": "longrope", "rope_theta": 1e4, "factor": 1.0},
    **{"short_factor": [1.0] * 8, "long_factor": [1.0] * 8},
    "original_max_position_embeddings": 2048,
}
OLD = os.environ.get("INVARIANCE_OLD_TRANSFORMERS")
READ = """
import sys, torch, transformers
assert transformers.__version__.startswith("4."), transformers.__version__
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
transformers.AutoTokenizer.from_pretrained(sys.argv[1])
print(repr(model(torch.arange(1, 101)[None] % 41).logits.detach().double().norm().item()))
"""


def exported(name: str, folder: Path) -> PreTrainedModel:
    family, rope, _ = ROPE[name]
    shape = {"vocab_size": 41, "hidden_size": 32, "max_position_embeddings": 320}
    model = tiny(family, **shape, **({"rope_parameters": rope} if rope else {}))
    step = {"spaces": "vo", "rotate": "random_orthogonal"}
    return written(compress(model, {"model": "m", "steps": [step]}), folder)


def written(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    model.save_pretrained(folder)
    save_tokenizer(tokenizer(), folder)
    return model


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(IDS).logits


@pytest.mark.parametrize("name", ROPE)
def test_positions_are_written_by_older_keys_too_and_read_the_same(
    name: str, tmp_path: Path
) -> None:
    model = exported(name, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    known = ("partial_rotary_factor", *OLDER)
    assert {k: config[k] for k in known if k in config} == ROPE[name][2]
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), logits(model))
    for key in known:
        config.pop(key, None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert plain.config.to_dict() | ROPE[name][2] == again.config.to_dict() | ROPE[name][2]


def test_a_run_that_streams_writes_the_older_keys_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INVARIANCE_CACHE", str(tmp_path / "cache"))
    model = save_model(tmp_path / "m", rope_parameters=THETA)
    step = {"spaces": "mlp", "select": {"uniform": {"width": 32}}}
    asked = Recipe.from_dict({"model": str(model), "steps": [step]})
    (tmp_path / "r.yaml").write_text(asked.to_yaml())
    run(tmp_path / "r.yaml", tmp_path / "out", [])
    config = json.loads((tmp_path / "out/model/config.json").read_text())
    assert config["rope_theta"] == 123.0 and config["rope_parameters"]["rope_theta"] == 123.0


def test_a_tokenizer_has_a_class_that_older_versions_know(tmp_path: Path) -> None:
    save_tokenizer(tokenizer(), tmp_path)
    said = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert said["tokenizer_class"] == "PreTrainedTokenizerFast"
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.get_vocab() == tokenizer().get_vocab()
    assert again("people of the States").input_ids == tokenizer()("people of the States").input_ids


def test_what_was_exported_is_exported_again_with_its_new_positions(tmp_path: Path) -> None:
    model = exported("scaled", tmp_path / "one")
    calibrated = {"steps": [{"spaces": "vo", "rotate": "identity"}], "model": "m"}
    twice = written(compress(model, calibrated), tmp_path / "two")
    assert torch.allclose(logits(twice), logits(model), atol=1e-5)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "two").eval()
    assert torch.equal(logits(loaded), logits(twice))


@pytest.mark.skipif(
    OLD is None, reason="INVARIANCE_OLD_TRANSFORMERS names no folder with version 4"
)
@pytest.mark.parametrize("name", ROPE)
def test_version_4_computes_the_same(name: str, tmp_path: Path) -> None:
    model = exported(name, tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(OLD)},
    )
    norm = logits(model).double().norm().item()
    assert float(done.stdout) == pytest.approx(norm, rel=1e-9)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, []),
        ({"hidden_size": 48}, [r"32 does not divide \(48\)"]),
        ({"head_dim": 12}, [r"32 does not divide \(48\)"]),
        ({"rope_parameters": LONG}, ["writes nonsense"]),
        (
            {"layer_types": ["sliding_attention", "full_attention"], "_sliding_window_pattern": 3},
            ["fixed rhythm"],
        ),
    ],
)
def test_what_programs_are_known_to_read_wrongly_is_told(
    changes: dict[str, Any], said: list[str]
) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
    config = AutoConfig.for_model("llama", num_attention_heads=4, vocab_size=64, **sizes)
    vars(config).update(changes)
    found = misread(config)
    assert len(found) == len(said)
    assert all(re.search(a, b) for a, b in zip(said, found, strict=True))


def test_of_experts_the_widths_that_are_stored_are_told() -> None:
    """``intermediate_size`` is of dense layers, and there is none."""
    config = small("qwen2_moe").model.config
    config.moe_intermediate_size, config.shared_expert_intermediate_size = 16, 64
    config.intermediate_size = 40
    assert any("(16)" in line for line in misread(config))
