"""What a config or a model complains of, turned into other values: tried in turn until a model is built and runs."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from .shrink import Values
from .sizes import HEAD, HEADS, WIDTH, is_number

# what an attribute is set to that a model reads and its config lacks
_MISSING: Mapping[str, Any] = {"rope_theta": 10000.0, "dropout": 0.0, "attention_dropout": 0.0}

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def repaired(values: Values, complaint: str, defaults: Mapping[str, Any]) -> Values | None:
    """Values that answer one complaint; None where it is not understood or already answered."""
    for pattern, answer in _ANSWERS:
        found = re.search(pattern, complaint)
        if found:
            changed = answer(values, defaults, *found.groups())
            if changed is not None and changed != values:
                return changed
    return None


def within(values: Values, defaults: Mapping[str, Any], key: str, v: Any) -> Values:
    """A key's value: here, and if that did not help, in every sub-config."""
    if values.get(key) != v:
        return {**values, key: v}
    inner = {k: {**values.get(k, {}), key: v} for k, d in defaults.items() if is_config(k, d)}
    return {**values, **(inner or {"text_config": {**values.get("text_config", {}), key: v}})}


def is_config(key: str, v: Any) -> bool:
    return key.endswith("config") and isinstance(v, Mapping) and key != "per_layer_config"


def without(values: Values, defaults: Mapping[str, Any], key: str) -> Values:
    return {k: without_in(v, key) for k, v in values.items() if k != key}


def without_in(v: Any, key: str) -> Any:
    return {k: w for k, w in v.items() if k != key} if isinstance(v, Mapping) else v


def number(values: Values, defaults: Mapping[str, Any], key: str, n: str) -> Values:
    return within(values, defaults, key, int(n))


def equal(values: Values, defaults: Mapping[str, Any], key: str, other: str) -> Values | None:
    n = values.get(other)
    return within(values, defaults, key, n) if is_number(n) else None


def missing(values: Values, defaults: Mapping[str, Any], key: str) -> Values | None:
    return within(values, defaults, key, _MISSING[key]) if key in _MISSING else None


_ANSWERS = (
    (r"property '(\w+)' of '\w+' object has no setter", without),
    (r"unexpected keyword argument '(\w+)'", without),
    (r"(\w+)`? must be (\d+)", number),
    (r"(\w+)`? must match `?(\w+)", equal),
    (r"Config' object has no attribute '(\w+)'", missing),
)


def variations(values: Values, defaults: Mapping[str, Any]) -> list[Values]:
    """The values themselves, then with what default configs often lack or what seldom fits."""
    unset, rope, kinds, alike = (
        {**addition(f, defaults)} for f in (unset_values, one_rope, ropes_by_kind, all_heads)
    )
    tries = [{}, unset, rope, merged(unset, rope), kinds, alike, merged(merged(alike, unset), rope)]
    out = [merged(values, t) for i, t in enumerate(tries) if i == 0 or t]
    return out + [d for v in out[:2] if (d := doubled(v)) != v]


def addition(f: Callable[[Mapping[str, Any]], Values], defaults: Mapping[str, Any]) -> Values:
    """What ``f`` says of a config and of each of its sub-configs."""
    inner = {k: addition(f, d) for k, d in defaults.items() if is_config(k, d)}
    return {**f(defaults), **{k: v for k, v in inner.items() if v}}


def merged(one: Values, two: Values) -> Values:
    """Both, the second where they differ; sub-configs are merged too, tables are not."""
    out = dict(one)
    for k, v in two.items():
        out[k] = merged(one[k], v) if k in one and is_config(k, v) else v
    return out


def one_rope(defaults: Mapping[str, Any]) -> Values:
    return {"rope_parameters": dict(_ROPE)} if "rope_parameters" in defaults else {}


def ropes_by_kind(defaults: Mapping[str, Any]) -> Values:
    kinds = defaults.get("layer_types")
    if "rope_parameters" not in defaults or not isinstance(kinds, (list, tuple)):
        return {}
    return {"rope_parameters": {kind: dict(_ROPE) for kind in kinds}}


def all_heads(defaults: Mapping[str, Any]) -> Values:
    """As many heads for keys and values as for queries."""
    return {"num_key_value_heads": HEADS} if "num_key_value_heads" in defaults else {}


def doubled(values: Values) -> Values:
    """Every layer twice: some types want two of a kind."""
    n = values.get("num_hidden_layers")
    lists = {k: v * 2 for k, v in values.items() if isinstance(v, list) and len(v) == n}
    return {**values, **lists, "num_hidden_layers": 2 * int(n)} if n and lists else values


def unset_values(defaults: Mapping[str, Any]) -> Values:
    """Small values of keys that are None by default, although a model reads them."""
    known = {
        r"experts_per_tok|top_k_experts": 2,
        r"^(n_routed|num|num_local|n)_experts$": 4,
        r"^n_group$|^topk_group$": 1,
        r"moe_intermediate_size": 24,
        r"indexer_n_heads": 2,
        r"indexer_kv_heads": 1,
        r"indexer_head_dim": 16,
        r"^n_shared_experts$": 1,
        r"^head_dim$": HEAD,
        r"indexer_budget": 4,
        r"indexer_compress_ratio": 2,
        r"^(attention_hidden_size)$": WIDTH,
    }
    out: Values = {}
    for key, v in defaults.items():
        found = next((n for pattern, n in known.items() if re.search(pattern, key)), None)
        if v is None and found is not None:
            out[key] = found
        if v is None and key == "layer_types":
            out[key] = ["full_attention", "full_attention"]
        plural = defaults.get(key.removeprefix("default_") + "s")
        if (
            v is None
            and key.startswith("default_")
            and isinstance(plural, (list, tuple))
            and plural
        ):
            out[key] = plural[0]
    return out
