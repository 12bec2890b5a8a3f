"""A tiny model of a type of transformers, from its shrunk default config, that runs on a few tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from invariance.core.errors import InputError

from .repair import repaired, variations
from .shrink import Values, shrunk

LARGEST = 3_000_000  # parameters
REPAIRS = 6  # complaints answered one after the other


@dataclass(frozen=True, eq=False)
class Tiny:
    """A tiny model in float64, its config, and how many tokens there are."""

    model: nn.Module
    config: PretrainedConfig
    vocabulary: int

    def tokens(self, sequences: int = 4, length: int = 12, seed: int = 1) -> dict[str, Any]:
        """An example of inputs: random tokens, none of them special."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, self.vocabulary, (sequences, length), generator=generator)
        return {"input_ids": ids, "use_cache": False}


def tiny(kind: str, seed: int = 0) -> Tiny:
    """A tiny causal model of a type. InputError says what each attempt failed at."""
    complaints: list[str] = []
    for values in attempts(kind, complaints):
        try:
            return built(AutoConfig.for_model(kind, **values), seed)
        except Exception as error:
            complaints.append(f"{type(error).__name__}: {error}")
    told = "; ".join(dict.fromkeys(" ".join(c.split())[:120] for c in complaints[:4]))
    raise InputError(
        f"{kind}: its default config cannot be made small ({told}). Give a config of your own"
    )


def attempts(kind: str, complaints: list[str]) -> Iterator[Values]:
    """Values to try; each complaint is answered before the next variation is tried."""
    start: Values = {}
    config = None
    for _ in range(REPAIRS):
        try:
            config = AutoConfig.for_model(kind, **start)
            break
        except Exception as error:
            complaints.append(f"{type(error).__name__}: {error}")
            answer = repaired(start, str(error), {})
            if answer is None:
                return
            start = answer
    if config is None:
        return
    defaults = config.to_dict()
    for values in variations({**shrunk(config), **start}, defaults):
        for _ in range(REPAIRS):
            before = len(complaints)
            yield values
            answer = (
                repaired(values, complaints[-1], defaults) if len(complaints) > before else None
            )
            if answer is None:
                break
            values = answer


def from_values(kind: str, values: Values) -> PretrainedConfig:
    """The shrunk default config of a type, with other values for keys that it has."""
    config = AutoConfig.for_model(kind)
    known = {getattr(config, "attribute_map", {}).get(k, k): v for k, v in values.items()}
    kept = {k: v for k, v in known.items() if k in config.to_dict()}
    return AutoConfig.for_model(kind, **{**shrunk(config), **kept})


def built(config: PretrainedConfig, seed: int) -> Tiny:
    """The causal model of a config, with random weights, once it has run."""
    torch.manual_seed(seed)
    kind: Any = AutoModelForCausalLM._model_mapping[type(config)]
    config = own_config(config, kind.config_class)
    if getattr(config, "is_decoder", None) is False:
        config.is_decoder = True
    model: Any = from_config(config, kind)
    count = sum(p.numel() for p in model.parameters())
    if count > LARGEST:
        raise ValueError(f"{count} parameters, more than {LARGEST}")
    model = model.double().eval()
    untie(model)
    random_weights(model, seed)
    table = model.get_input_embeddings()
    rows = (
        table.weight.shape[0]
        if isinstance(table, nn.Embedding)
        else config.get_text_config().vocab_size
    )
    made = Tiny(model, config, min(60, rows))
    from ..derive.certify import outputs

    if not bool(torch.isfinite(outputs(model, made.tokens())).all()):
        raise ValueError("its outputs are not finite")
    return made


def own_config(config: PretrainedConfig, wanted: Any) -> PretrainedConfig:
    """The part of a config that the causal model of its type is made of."""
    if wanted is None or isinstance(config, wanted):
        return config
    return next((v for v in vars(config).values() if isinstance(v, wanted)), config)


def from_config(config: PretrainedConfig, kind: Any) -> nn.Module:
    """With plain attention and experts one by one, where the type has them."""
    for options in (
        {"attn_implementation": "eager", "experts_implementation": "eager"},
        {"attn_implementation": "eager"},
        {},
    ):
        try:
            return kind._from_config(config, **options)
        except (ValueError, TypeError) as error:
            last = error
    raise last


def untie(model: Any) -> bool:
    """Gives a head that shares its weight with the table of tokens a copy of its own. Whether there was one."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if (
        table is None
        or head is None
        or getattr(head, "weight", None) is not getattr(table, "weight", 0)
    ):
        return False
    head.weight = nn.Parameter(table.weight.detach().clone(), requires_grad=False)
    return True


def random_weights(model: nn.Module, seed: int) -> None:
    """Every weight is random and none is zero: gains, biases, and buffers that are stored and zero."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.state_dict(keep_vars=True).values():
        if not p.is_floating_point() or not (
            isinstance(p, nn.Parameter) or not bool((p != 0).any())
        ):
            continue
        fan = max(1, p.shape[-1] if p.dim() > 1 else 4)
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64) / fan**0.5
        p.data.copy_(torch.nan_to_num(p.data).clamp(-3, 3) + 0.3 * noise + 0.02)
        p.requires_grad_(False)
