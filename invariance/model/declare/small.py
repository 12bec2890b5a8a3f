"""A small model that stands for a config: its values stay but sizes, eps and angles, which are alike for all configs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from ..described.weightless import on_meta
from ..tiny import Tiny, shrunk
from ..tiny.build import LARGEST, built
from ..tiny.sizes import HEAD, HEADS, LENGTH, VOCABULARY, WIDTH, is_number

PASSING = (
    *("model_type", "dtype", "torch_dtype", "quantization_config", "transformers_version"),
    *("architectures", "_name_or_path", "id2label", "label2id", "initializer_range"),
    *("use_cache", "key_prefix"),
)
FIXED: Mapping[str, Any] = {
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""What says nothing of what a model computes: left out, or the same for all. A tied head gets a weight of its own."""

INNER, WINDOW, PAIRS = 40, 8, HEAD // 2
EPS, THETA = 1e-5, 1e4
HEAD_WIDTHS = (HEAD, 20, 12)  # tried in turn: some share of a head must come out whole and even

_SIZES: tuple[tuple[str, int], ...] = (
    (r"^(hidden_size|d_model|n_embd|n_embed|embed_dim|hidden_dim|model_dim)$", WIDTH),
    (r"^(num_attention_heads|num_heads|n_heads?)$", HEADS),
    (r"^vocab_size$", VOCABULARY),
    (r"^(intermediate_size|ffn_dim|ffn_hidden_size|n_inner|d_ff)$", INNER),
    (r"^head_dim$", HEAD),
    (r"^original_max_position_embeddings$", LENGTH // 2),
    (r"^(max_position_embeddings|n_positions|n_ctx|max_sequence_length)$", LENGTH),
    (r"^sliding_window$", WINDOW),
)
_KV_HEADS = re.compile(r"^(num_key_value_heads|num_kv_heads|n_head_kv)$")

Values = dict[str, Any]


def small_values(config: PretrainedConfig) -> Values:
    """Values of the small config; those of configs that differ in sizes alone are the same."""
    values = config.to_dict()
    numbers = {k: v for k, v in values.items() if is_number(v)}
    small = {**values, **shrunk(config)}
    small = {k: _fixed(k, v, numbers) for k, v in small.items() if k not in PASSING}
    return {**small, **{k: v for k, v in FIXED.items() if k in values}}


def _fixed(key: str, value: Any, numbers: Mapping[str, int]) -> Any:
    """The small value of a key; ``numbers`` are the config's own."""
    if isinstance(value, Mapping) and key.startswith("rope"):
        return {k: _fixed_rope(k, v) for k, v in value.items()}
    if isinstance(value, float) and key.endswith("eps"):
        return EPS
    before = numbers.get(key)
    if before is None or before <= 0:
        return value
    if _KV_HEADS.search(key):
        return HEADS if before == numbers.get("num_attention_heads") else HEADS // 2
    for pattern, n in _SIZES:
        if re.search(pattern, key):
            return n
    return WIDTH if before == numbers.get("hidden_size") else value


def _fixed_rope(key: str, value: Any) -> Any:
    """Rotary positions: the lengths that they were trained on, and factors, of which there is one a pair."""
    if isinstance(value, Mapping):
        return {k: _fixed_rope(k, v) for k, v in value.items()}
    if isinstance(value, (list, tuple)) and len(value) > 1 and "factor" in key:
        return [*value, *[value[-1]] * PAIRS][:PAIRS]
    if key == "rope_theta" and value is not None:
        return THETA
    return next((n for pattern, n in _SIZES if re.search(pattern, key)), value)


def small_model(kind: str, values: Values) -> Tiny:
    """A model of small values in float64, with random weights. Raises whatever the type's own code raises."""
    failed: Exception | None = None
    for width in HEAD_WIDTHS:
        try:
            config = small_config(kind, values, width)
            _check_small(config)
            return built(config, seed=0)
        except Exception as e:  # each type fails in its own way
            failed = failed or e
    assert failed is not None
    raise failed


def _check_small(config: PretrainedConfig) -> None:
    """Raises ValueError for a model that is large although its config was made small."""
    numbers = sum(p.numel() for p in on_meta(config).parameters())
    if numbers > LARGEST:
        raise ValueError(f"{numbers} parameters, more than {LARGEST}")


def small_config(kind: str, values: Values, head: int = HEAD) -> PretrainedConfig:
    """The config of small values, its heads as wide as is asked."""
    wider = {k: head for k in ("head_dim",) if values.get(k)}
    if head != HEAD:
        wider |= {k: HEADS * head for k, v in values.items() if v == WIDTH and is_number(v)}
    return AutoConfig.for_model(kind, **{**values, **wider})
