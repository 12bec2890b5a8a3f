"""Where weights come from: a source says what a model is, and hands out copies of the tensors that are asked for."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel


class Source(Protocol):
    """A model's weights by their names in the family's own model. Nothing is in memory until it is read."""

    @property
    def config(self) -> PretrainedConfig: ...
    @property
    def stored(self) -> torch.dtype:
        """What the weights are stored in."""

    @property
    def nbytes(self) -> int:
        """The size of all weights, as they are stored."""

    @property
    def skeleton(self) -> PreTrainedModel:
        """The family's own model in eval mode, tied as the weights are: parameters on meta, buffers with their values."""

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Copies of tensors, in their stored dtype."""

    def rows(self, name: str, index: Int[Tensor, " n"]) -> Tensor:
        """A copy of some rows of a tensor, in its stored dtype."""

    def digest(self) -> str:
        """A hash of all weights."""


def on_meta(parameter: nn.Parameter, dtype: torch.dtype | None = None) -> nn.Parameter:
    """A parameter of the same shape and no content."""
    empty = torch.empty(parameter.shape, dtype=dtype or parameter.dtype, device="meta")
    return nn.Parameter(empty, requires_grad=parameter.requires_grad)


def filled(source: Source, device: str | torch.device = "cpu") -> PreTrainedModel:
    """A model with all the weights of a source, in the dtype that most are stored in; one tensor is read at a time."""
    model = copy.deepcopy(source.skeleton)
    read: dict[int, nn.Parameter] = {}
    for name, blank in model.named_parameters():
        value = source.read([name])[name].to(device, source.stored)
        read[id(blank)] = nn.Parameter(value, requires_grad=blank.requires_grad)
    for module in model.modules():
        for leaf, empty in module._parameters.items():
            if empty is not None:
                module._parameters[leaf] = read[id(empty)]
    return model.to(device=device)  # type: ignore[call-arg]


def placed(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors in the places of a module's parameters and buffers, by their names in it, whatever their shapes."""
    for name, value in tensors.items():
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        if leaf in owner._parameters:
            before = owner._parameters[leaf]
            grad = before is not None and before.requires_grad
            owner._parameters[leaf] = nn.Parameter(value, requires_grad=grad)
        else:
            owner._buffers[leaf] = value


def emptied(module: nn.Module) -> None:
    """Take the content of all parameters away; shapes, and buffers, stay."""
    for owner in module.modules():
        for leaf, parameter in owner._parameters.items():
            if parameter is not None and not parameter.is_meta:
                owner._parameters[leaf] = on_meta(parameter)
