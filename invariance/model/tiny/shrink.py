"""A config's default values made small: numbers, lists with one entry a layer, sub-configs, tables of rotary positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PretrainedConfig

from .sizes import CLIP, HEAD, VOCABULARY, Scale, is_layers, is_number, is_token

Values = dict[str, Any]


def shrunk(config: PretrainedConfig) -> Values:
    """Keyword arguments of a small config of the same type: only what differs from the default."""
    return small_values(config.to_dict())


def small_values(defaults: Mapping[str, Any]) -> Values:
    scale = Scale.of(defaults)
    layers = next((v for k, v in defaults.items() if is_layers(k) and is_number(v)), None)
    lists = {k: v for k, v in defaults.items() if is_list_of_layers(v, layers)}
    chosen = kinds_of_layers(lists, defaults.get("per_layer_config"), layers)
    out: Values = {}
    for key, v in defaults.items():
        if key.startswith("_") or key in ("id2label", "label2id", "torch_dtype", "dtype"):
            continue
        if key == "clip_qkv":
            out[key] = CLIP
        elif key in lists:
            out[key] = [scale.small(key, n) if is_number(n) else n for n in (v[i] for i in chosen)]
        elif key == "per_layer_config" and isinstance(v, Mapping):
            out[key] = layers_apart(v, chosen, scale)
        elif isinstance(v, Mapping):
            inner = small_values(v) if key.endswith("config") else small_table(v, scale)
            if inner:
                out[key] = {**v, **inner} if not key.endswith("config") else keep_type(v, inner)
        elif is_number(v):
            out[key] = small_number(key, v, scale, (layers or 0, len(chosen)))
        elif isinstance(v, Sequence) and not isinstance(v, str):
            out[key] = small_list(key, v, scale, len(chosen))
    return {k: v for k, v in out.items() if v != defaults.get(k)}


def keep_type(v: Mapping[str, Any], inner: Values) -> Values:
    return {**inner, **({"model_type": v["model_type"]} if v.get("model_type") else {})}


def small_number(key: str, v: int, scale: Scale, layers: tuple[int, int]) -> int:
    """layers: how many there are by default, and how many are kept."""
    if is_layers(key):
        return layers[1]
    if "shared_layers" in key:
        return layers[1] if v == layers[0] else 0
    if is_token(key):
        return v if v < 3 else min(v, VOCABULARY - 1)
    return scale.small(key, v)


def small_table(table: Mapping[str, Any], scale: Scale) -> Values:
    """Numbers in a plain dictionary, such as the parameters of rotary positions."""
    out: Values = {}
    for key, v in table.items():
        if isinstance(v, Mapping):
            inner = small_table(v, scale)
            out |= {key: {**v, **inner}} if inner else {}
        elif is_number(v) and "theta" not in key:
            out[key] = scale.small(key, v)
        elif isinstance(v, Sequence) and not isinstance(v, str):
            out[key] = small_list(key, v, scale, 2)
    return {k: v for k, v in out.items() if v != table.get(k)}


# ---- layers


def is_list_of_layers(v: Any, layers: int | None) -> bool:
    return isinstance(v, (list, tuple)) and layers is not None and len(v) == layers > 0


def kinds_of_layers(
    lists: Mapping[str, Sequence[Any]], apart: Any, layers: int | None, most: int = 6
) -> list[int]:
    """The first layer of each kind, as far as the config's own lists tell kinds apart; two where there is one kind."""
    if layers is None:
        return [0, 1]
    apart = {int(k): str(v) for k, v in apart.items()} if isinstance(apart, Mapping) else {}
    first: dict[tuple[str, ...], int] = {}
    for i in range(layers):
        kind = tuple(str(v[i]) for v in lists.values() if is_kind(v))
        first.setdefault((*kind, apart.get(i, "")), i)
    chosen = sorted(first.values())[:most]
    return chosen if len(chosen) > 1 else [0, min(1, layers - 1)]


def is_kind(entries: Sequence[Any]) -> bool:
    """Whether a list says of each layer what kind it is: not a number of its own for each."""
    return len({str(e) for e in entries}) <= max(3, len(entries) // 3)


def layers_apart(table: Mapping[str, Any], chosen: Sequence[int], scale: Scale) -> Values:
    """Values of single layers, by the layer's number in the small model; twice the usual head stays twice."""
    out: Values = {}
    width = max(map(len, table), default=1)
    for j, i in enumerate(chosen):
        own = table.get(str(i).zfill(width))
        if own:
            out[str(j)] = {k: special(k, v, scale) for k, v in own.items()}
    return out


def special(key: str, v: Any, scale: Scale) -> Any:
    usual = scale.defaults.get(key)
    if is_number(v) and is_number(usual) and v and usual:
        small = scale.small(key, usual)
        return max(1, small * v // usual) if v > usual else max(1, small // max(1, usual // v))
    return v


# ---- lists


def small_list(key: str, v: Sequence[Any], scale: Scale, layers: int) -> Any:
    """Lists of layers' numbers keep those that exist; parts of a whole stay parts of the small whole."""
    if v and all(map(is_number, v)):
        if "section" in key:
            return parts(v, HEAD // 2)
        if scale.width is not None and sum(v) == scale.width:
            return parts(v, scale.small("hidden_size", scale.width))
        if any(w in key for w in ("layer", "indices", "indexes")):
            kept = [i for i in v if i < layers]
            return like(v, kept or [layers - 1])
        if product(v) == scale.defaults.get("max_position_embeddings"):
            return like(v, [8] * len(v))
        return like(v, [scale.small(key, n) for n in v])
    if v and all(is_repeated(e) for e in v):
        return [[e[0], max(1, layers // len(e[0]))] for e in v]
    if v and all(isinstance(e, str) for e in v) and len(v) > 4:
        return list(dict.fromkeys(v))
    return v


def is_repeated(e: Any) -> bool:
    """Whether an entry is [kinds of layers, how often]."""
    return (
        isinstance(e, (list, tuple)) and len(e) == 2 and isinstance(e[0], list) and is_number(e[1])
    )


def parts(v: Sequence[int], whole: int) -> Any:
    """Numbers in the proportions of ``v`` that add up to ``whole``."""
    out = [max(1, n * whole // sum(v)) for n in v]
    out[out.index(max(out))] += whole - sum(out)
    return like(v, out)


def like(v: Sequence[int], out: list[int]) -> Sequence[int]:
    return tuple(out) if isinstance(v, tuple) else out


def product(v: Sequence[int]) -> int:
    total = 1
    for n in v:
        total *= n
    return total
