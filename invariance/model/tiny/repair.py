"""What a config or a model complains of, turned into other values: tried in turn until a model is built and runs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .shrink import Values
from .sizes import HEADS, WIDTH, is_number

# what an attribute is set to that a model reads and its config lacks
_MISSING: Mapping[str, Any] = {"rope_theta": 10000.0, "dropout": 0.0, "attention_dropout": 0.0}

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def repaired(values: Values, complaint: str) -> Values | None:
    """Values that answer one complaint; None where it is not understood or already answered."""
    for pattern, answer in _ANSWERS:
        found = re.search(pattern, complaint)
        if found:
            changed = answer(values, *found.groups())
            if changed is not None and changed != values:
                return changed
    return None


def without(values: Values, key: str) -> Values | None:
    return {k: without_in(v, key) for k, v in values.items() if k != key}


def without_in(v: Any, key: str) -> Any:
    return {k: w for k, w in v.items() if k != key} if isinstance(v, Mapping) else v


def number(values: Values, key: str, n: str) -> Values:
    return {**values, key: int(n)}


def equal(values: Values, key: str, other: str) -> Values | None:
    n = values.get(other)
    return {**values, key: n} if is_number(n) else None


def missing(values: Values, key: str) -> Values | None:
    return {**values, key: _MISSING[key]} if key in _MISSING else None


def every_layer(values: Values, key: str) -> Values | None:
    """A kind of layer that rotary positions have no entry for."""
    return {**values, "rope_parameters": dict(_ROPE)}


_ANSWERS = (
    (r"property '(\w+)' of '\w+' object has no setter", without),
    (r"unexpected keyword argument '(\w+)'", without),
    (r"(\w+)`? must be (\d+)", number),
    (r"(\w+)`? must match `?(\w+)", equal),
    (r"Config' object has no attribute '(\w+)'", missing),
)


def variations(values: Values, defaults: Mapping[str, Any]) -> list[Values]:
    """The values themselves, then with what default configs often lack or what seldom fits."""
    kinds = [k for k in ("layer_types",) if isinstance(defaults.get(k), list)]
    ropes = {"rope_parameters": dict(_ROPE)}
    by_kind = {"rope_parameters": {t: dict(_ROPE) for k in kinds for t in defaults[k]}}
    unset = {k: v for k, v in unset_values(defaults).items() if k not in values}
    alike = {k: HEADS for k in ("num_key_value_heads",) if k in defaults}
    tries = [{}, unset, ropes, {**unset, **ropes}, by_kind, alike, {**alike, **unset, **ropes}]
    return [{**values, **t} for i, t in enumerate(tries) if i == 0 or t]


def unset_values(defaults: Mapping[str, Any]) -> Values:
    """Small values of keys that are None by default, although a model reads them."""
    known = {
        r"experts_per_tok|top_k_experts": 2,
        r"^(n_routed|num|num_local|n)_experts$": 4,
        r"^n_group$|^topk_group$": 1,
        r"moe_intermediate_size": 24,
        r"indexer_n_heads": 2,
        r"indexer_kv_heads": 1,
        r"indexer_head_dim": 8,
        r"indexer_budget": 4,
        r"indexer_compress_ratio": 2,
        r"^(attention_hidden_size)$": WIDTH,
    }
    out: Values = {}
    for key, v in defaults.items():
        if v is None:
            out |= {key: n for pattern, n in known.items() if re.search(pattern, key)}
        if v is None and key == "layer_types":
            out[key] = ["full_attention", "full_attention"]
        plural = defaults.get(key.removeprefix("default_") + "s")
        if v is None and key.startswith("default_") and isinstance(plural, (list, tuple)) and plural:
            out[key] = plural[0]
    return out
