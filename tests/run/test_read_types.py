"""Recipes on types that nobody declared and that are read: exact, cut, under a stock config, and loaded again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from invariance import compress
from invariance.model.families import declared
from invariance.model.verify import logits, relative_error
from invariance.testing.models import check_model
from invariance.testing.tiny import redraw

IDS = torch.randint(1, 41, (16, 24), generator=torch.Generator().manual_seed(1))
STREAM = {"rotate": "pca", "select": {"uniform": {"keep": 0.75}}, "slice": "truncate"}
CHANNELS = {"rotate": "permute", "select": {"uniform": {"keep": 0.5}}, "slice": "least_squares"}


def tiny(kind: str, **values: Any) -> PreTrainedModel:
    shape = {"vocab_size": 41, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}
    config = AutoConfig.for_model(kind, **{**shape, **heads, **ends, **values})
    assert declared(config)
    return redraw(AutoModelForCausalLM.from_config(config).eval(), 0)


@pytest.mark.parametrize(
    ("kind", "values", "stock_stream"),
    [
        ("gemma", {"head_dim": 8}, True),  # its table is scaled
        ("seed_oss", {"head_dim": 8}, True),
        ("starcoder2", {}, False),  # under LayerNorms no stock config holds a cut stream
    ],
)
def test_a_type_that_is_read_goes_all_the_way(
    kind: str, values: dict[str, Any], stock_stream: bool, tmp_path: Path
) -> None:
    model = tiny(kind, **values)
    check_model(model)
    np.save(tmp_path / "t.npy", IDS.numpy())
    data = {"data": str(tmp_path / "t.npy"), "sequences": 16, "tokens": 24}
    for spaces, how, stock in (("residual", STREAM, stock_stream), ("mlp", CHANNELS, True)):
        step = {"spaces": spaces, **how}
        made = compress(model, {"model": "tiny", "calibrate": data, "steps": [step]})
        assert (made.config.model_type == kind) is stock
        made.save_pretrained(tmp_path / spaces)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / spaces)
        assert relative_error(logits(made, IDS[:2]), logits(again, IDS[:2])) == 0


def test_scores_that_a_config_scales_are_no_stock_form_once_heads_are_narrower(
    tmp_path: Path,
) -> None:
    np.save(tmp_path / "t.npy", IDS.numpy())
    data = {"data": str(tmp_path / "t.npy"), "sequences": 16, "tokens": 24}
    half = {"select": {"uniform": {"keep": 0.5}}, "slice": "truncate"}
    steps = [
        {"spaces": "qk", "rotate": {"rope_pairs": {"per": "model"}}, **half},
        {"spaces": "vo", "rotate": "head_svd", **half},
    ]
    for kind, stock in (("granite", False), ("gemma", True)):
        model = tiny(kind, head_dim=8)
        made = compress(model, {"model": "tiny", "calibrate": data, "steps": steps})
        assert (made.config.model_type == kind) is stock
