"""What a config.json may say: every number in it is checked before anything is built from it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from transformers import CONFIG_MAPPING

from ..core.errors import InputError
from .form import Form

MAX_BYTES, MAX_DEPTH = 2**24, 64
Width = Annotated[int, Field(ge=1, le=2**20)]
Few = Annotated[int, Field(ge=1, le=2**14)]
Depth = Annotated[int, Field(ge=1, le=2**10)]  # the deepest models have 126 blocks
Small = Annotated[float, Field(gt=0, le=1)]
Rate = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
Length = Annotated[int, Field(ge=1, le=2**31)]
Token = Annotated[int, Field(ge=-1, lt=2**31)]  # -1 stands for none in some
NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
FEED_FORWARD = ("intermediate_size", "ffn_dim")


class Shape(BaseModel):
    """The numbers of a language model's config that shapes follow from, under their common names."""

    model_config = ConfigDict(strict=True, extra="ignore")

    vocab_size: Annotated[int, Field(ge=1, le=2**24)] | None = None
    hidden_size: Width | None = None
    intermediate_size: Width | list[Width] | None = None
    ffn_dim: Width | None = None
    word_embed_proj_dim: Width | None = None
    num_hidden_layers: Depth | None = None
    num_attention_heads: Few | list[Any] | None = None
    num_key_value_heads: Few | list[Any] | None = None
    head_dim: Width | None = None
    attention_head_size: Width | None = None
    max_position_embeddings: Length | None = None
    sliding_window: Annotated[int, Field(ge=0, le=2**31)] | None = None
    rms_norm_eps: Small | None = None
    layer_norm_eps: Small | None = None
    layer_norm_epsilon: Small | None = None
    dropout: Rate | None = None
    attention_dropout: Rate | None = None
    hidden_dropout: Rate | None = None
    activation_dropout: Rate | None = None
    layerdrop: Rate | None = None
    embd_pdrop: Rate | None = None
    resid_pdrop: Rate | None = None
    attn_pdrop: Rate | None = None
    partial_rotary_factor: Annotated[float, Field(gt=0, le=1)] | None = None
    tie_word_embeddings: bool | None = None
    rope_theta: Positive | None = None
    rope_local_base_freq: Positive | None = None
    bos_token_id: Token | list[Token] | None = None
    eos_token_id: Token | list[Token] | None = None
    pad_token_id: Token | list[Token] | None = None

    @model_validator(mode="after")
    def _heads(self) -> Shape:
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if isinstance(heads, int) and isinstance(groups, int) and heads % groups:
            raise ValueError(
                f"num_key_value_heads: {heads} query heads cannot share {groups} key/value heads evenly"
            )
        own = self.head_dim or self.attention_head_size
        whole = isinstance(heads, int) and self.hidden_size and own is None
        if whole and groups is None and self.hidden_size % heads:  # type: ignore[operator]
            raise ValueError(
                f"num_attention_heads: a width of {self.hidden_size} does not divide into {heads} heads"
            )
        return self


class Rope(BaseModel):
    """The numbers that rotary positions are computed from, as `rope_parameters` and the older `rope_scaling` hold them."""

    model_config = ConfigDict(strict=True, extra="ignore")

    rope_theta: Positive | None = None
    factor: Positive | None = None
    partial_rotary_factor: Small | None = None
    original_max_position_embeddings: Length | None = None
    attention_factor: Positive | None = None
    beta_fast: Positive | None = None
    beta_slow: Positive | None = None
    low_freq_factor: Positive | None = None
    high_freq_factor: Positive | None = None
    short_factor: list[Positive] | None = None
    long_factor: list[Positive] | None = None


ROPES = ("rope_parameters", "rope_scaling")


def read_json(path: Path) -> Any:
    """What a small JSON file beside a model's weights holds. Raises InputError with the file."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise ValueError("larger than 16 MiB")
        return json.loads(raw.decode("utf-8"))
    except RecursionError:
        raise InputError(f"{path}: nested too deeply for a config. {AGAIN}") from None
    except OSError as e:
        raise InputError(f"{path}: {e.strerror}. {AGAIN}") from None
    except ValueError as e:
        raise InputError(f"{path}: not valid JSON ({e}). {AGAIN}") from None


def read_config(path: Path) -> dict[str, Any]:
    """A config.json whose every number can be. Raises InputError with the file and the key."""
    found = read_json(path)
    if not isinstance(found, dict) or not isinstance(found.get("model_type"), str):
        raise InputError(
            f"{path}: no model_type, and the family of a model is never guessed. "
            'Add it as transformers writes it, for example "model_type": "llama".'
        )
    check_config(str(path), found, whole=True)
    return found


AGAIN = "Save or download the model again."


def check_config(where: str, config: Mapping[str, Any], *, whole: bool = False) -> None:
    """Raises InputError, with the key, for numbers that no model has; ``whole`` where a missing one would be guessed."""
    odd = [(k, v) for k, v in _numbers(config, where) if type(v) is float and not math.isfinite(v)]
    for key, value in odd:
        if (key, value) not in _unbounded(config.get("model_type")):
            raise InputError(f"{where}: {key}: {value} is not a finite number. {AGAIN}")
    form = config.get("invariance") if config.get("model_type") == "invariance" else None
    if isinstance(form, Mapping):
        _validate(Form, form, where, under="invariance.")
        check_config(f"{where}: invariance.dense", form.get("dense", {}))
    text = config.get("text_config")
    part = {**config, **text} if isinstance(text, Mapping) else dict(config)
    kind = part.get("model_type") if not isinstance(form, Mapping) else form["family"]
    aliases = _aliases(kind)
    missing = [key for key in NEEDED if aliases.get(key, key) in _fields(kind)]
    missing += [key for key in FEED_FORWARD if key in _fields(kind)]
    missing = [aliases.get(key, key) for key in missing]
    for key in missing:
        if whole and key not in part and not isinstance(text, Mapping):
            raise InputError(
                f"{where}: the key '{key}' is missing, and another model's would be taken. {AGAIN}"
            )
    named = {common: part[own] for common, own in aliases.items() if own in part}
    _validate(Shape, {**part, **named}, where, aliases)
    for key in ROPES:
        for name, found in _ropes(part.get(key), key):
            _validate(Rope, found, where, under=f"{name}.")


def _ropes(found: Any, key: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The parameters of rotary positions, which some families have for each type of layer."""
    if isinstance(found, Mapping):
        yield key, found
        for kind, inside in found.items():
            yield from _ropes(inside, f"{key}.{kind}")


def _validate(
    model: type[BaseModel],
    values: Mapping[str, Any],
    where: str,
    aliases: Mapping[str, str] | None = None,
    under: str = "",
) -> None:
    try:
        model.model_validate(dict(values))
    except ValidationError as e:
        error = e.errors()[0]
        raised = error.get("ctx", {}).get("error")
        if raised is not None:
            raise InputError(f"{where}: {raised}. {AGAIN}") from None
        head, *inside = error["loc"]
        node: Any = values.get(str(head))
        key = str((aliases or {}).get(str(head), head))
        part: Any
        for part in inside:  # of a union, pydantic also names the kind that it tried
            if isinstance(node, Mapping | list) and part in (
                node if isinstance(node, Mapping) else range(len(node))
            ):
                node, key = node[part], f"{key}.{part}"
        said = error["msg"].replace("Input should", "it should")
        raise InputError(
            f"{where}: {under}{key}: got {str(error['input'])[:60]}, but {said}. {AGAIN}"
        ) from None


def _numbers(value: Any, where: str, key: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """All that is in plain data, by dotted keys. Raises InputError where it is nested too deeply."""
    if depth > MAX_DEPTH:
        raise InputError(f"{where}: {key[:60]}: nested too deeply for a config. {AGAIN}")
    if isinstance(value, Mapping | list | tuple):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for name, child in items:
            yield from _numbers(child, where, f"{key}.{name}" if key else str(name), depth + 1)
    else:
        yield key, value


def _aliases(kind: Any) -> dict[str, str]:
    """How a family calls what has a common name."""
    found = _config_class(kind)
    return {} if found is None else dict(found.attribute_map)


def _fields(kind: Any) -> set[str]:
    """What a family's config has of its own."""
    found = _config_class(kind)
    return (
        set()
        if found is None
        else {k for c in found.__mro__ for k in vars(c).get("__annotations__", ())}
    )


def _unbounded(kind: Any) -> set[tuple[str, Any]]:
    """The numbers that a family's own default has infinite: a range without an end."""
    found = _config_class(kind)
    values = {} if found is None else found().to_dict()
    return {(k, v) for k, v in _numbers(values, str(kind)) if type(v) is float and math.isinf(v)}


def _config_class(kind: Any) -> Any:
    return CONFIG_MAPPING[kind] if isinstance(kind, str) and kind in CONFIG_MAPPING else None
