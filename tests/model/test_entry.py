"""Models in memory that cannot be worked on: each is named, with what to do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from tiny import tiny
from torch import nn
from torch.nn.utils import parametrizations, prune
from transformers import PreTrainedModel

from invariance.core.errors import InputError
from invariance.model.entry import check_model
from invariance.run.compress import compress

RECIPE = {"model": "m", "steps": [{"spaces": "mlp", "select": {"uniform": {"width": 16}}}]}
LORA = {"r": 2, "target_modules": ["q_proj"]}


def layer(model: PreTrainedModel, n: int = 0) -> Any:
    return model.get_submodule(f"model.layers.{n}")


def injected(m: PreTrainedModel) -> Any:
    inject_adapter_in_model(LoraConfig(**LORA), m)  # type: ignore[arg-type]
    return m


def pruned(m: PreTrainedModel) -> Any:
    prune.l1_unstructured(layer(m).mlp.down_proj, "weight", 0.5)
    return m


def parametrized(m: PreTrainedModel) -> Any:
    parametrizations.weight_norm(layer(m).mlp.down_proj)
    return m


def offloaded(m: PreTrainedModel) -> Any:
    layer(m, 1).to("meta")
    return m


def rounded(m: PreTrainedModel) -> Any:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(m, quantization.Int8WeightOnlyConfig())
    return m


def looped(m: PreTrainedModel) -> Any:
    m.get_submodule("model.layers")[1] = layer(m, 0)  # type: ignore[index,operator]
    return m


def shared_weight(m: PreTrainedModel) -> Any:
    layer(m, 1).mlp.up_proj.weight = layer(m, 0).mlp.up_proj.weight
    return m


def tied_unflagged(m: PreTrainedModel) -> Any:
    m.get_output_embeddings().weight = m.get_input_embeddings().weight
    return m


def with_nan(m: PreTrainedModel) -> Any:
    with torch.no_grad():
        layer(m).mlp.up_proj.weight[0, 0] = float("nan")
    return m


def compiled_inside(m: PreTrainedModel) -> Any:
    m.get_submodule("model.layers")[0] = torch.compile(layer(m))  # type: ignore[index,operator]
    return m


MODELS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "an adapter around it": (lambda m: get_peft_model(m, LoraConfig(**LORA)), "merge_and_unload"),
    "an adapter in it": (injected, "merge_and_unload"),
    "DataParallel": (nn.DataParallel, r"model\.module"),
    "compiled": (torch.compile, "_orig_mod"),
    "compiled inside": (compiled_inside, r"OptimizedModule at 'model\.layers\.0'"),
    "pruned by masks": (pruned, r"prune\.remove"),
    "parametrized": (parametrized, "remove_parametrizations"),
    "offloaded": (offloaded, "not in memory"),
    "rounded": (rounded, "not as plain numbers"),
    "layers that are one": (looped, r"'model\.layers\.0' stands in 2 places"),
    "weights that are one": (shared_weight, "the same weight"),
    "tied in silence": (tied_unflagged, r"tie_word_embeddings = True"),
    "NaN": (with_nan, "NaN"),
    "no head": (lambda m: m.model, "AutoModelForCausalLM"),
    "no model of transformers": (lambda m: nn.Linear(2, 2), "no model of transformers"),
    "no model": (lambda m: "model", "no model of PyTorch"),
}


@pytest.mark.parametrize("case", MODELS)
def test_what_cannot_be_worked_on_is_named_with_its_remedy(case: str) -> None:
    prepare, says = MODELS[case]
    model = prepare(tiny("llama"))
    with pytest.raises(InputError, match=says):
        check_model(model)
    with pytest.raises(InputError, match=says):
        compress(model, RECIPE)


@pytest.mark.parametrize("family", ["llama", "opt", "gemma3_text", "phi", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_models_that_are_whole_pass(family: str, tied: bool) -> None:
    model = tiny(family, tie_word_embeddings=tied)
    assert check_model(model) is model
    assert check_model(copy.deepcopy(model))


def test_a_merged_adapter_passes() -> None:
    made = get_peft_model(tiny("llama"), LoraConfig(**LORA))  # type: ignore[arg-type]
    assert check_model(made.merge_and_unload())  # type: ignore[operator]
