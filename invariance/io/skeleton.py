"""A model without numbers: the family's own modules, parameters on the meta device, buffers real."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from ..core.errors import InputError


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Parameters of modules that are made meanwhile are on the meta device, buffers real; tied ones stay one."""
    register = nn.Module.register_parameter

    def empty(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(torch.empty_like(param, device="meta"), param.requires_grad)
        register(module, name, param)

    nn.Module.register_parameter = empty  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def skeleton(
    config: PretrainedConfig, folder: Path | None = None, *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model that a config describes, in eval mode, tied as the config says; it takes no memory to speak of.

    Buffers are as from_pretrained makes them in float32. ``folder`` is where a generation_config.json may lie. Raises
    InputError if no model can be built.
    """
    config = copy.deepcopy(config)
    vars(config).pop("quantization_config", None)
    try:
        with no_init_weights(), parameters_on_meta():
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, trust_remote_code=trust_remote_code
            )
        model.tie_weights()
        if folder is not None and (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    except InputError:
        raise
    except Exception as e:  # each family fails in its own way
        why = " ".join(f"{type(e).__name__}: {e}".split())[:200]
        raise InputError(
            f"model type '{config.model_type}': no model can be built of its config.json ({why}). Repair the config."
        ) from None
    return model.eval()


def without_numbers(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model whose parameters are on the meta device."""
    blank: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
        for p in model.parameters()
    }
    return copy.deepcopy(model, blank).eval()


def tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """What a checkpoint holds of a model: parameters, a tied one once, and the buffers that are saved."""
    own = dict(model.named_parameters())
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return own | {n: t for n, t in model.state_dict().items() if n not in tied}


def aliases(model: PreTrainedModel) -> dict[str, str]:
    """Every further name of a tied parameter → its first."""
    first = {id(p): name for name, p in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {name: first[id(p)] for name, p in every if first[id(p)] != name}


def set_buffer(model: nn.Module, name: str, value: Tensor) -> None:
    """A buffer's new value, in the dtype that it has."""
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, value.to(model.get_buffer(name).dtype))
