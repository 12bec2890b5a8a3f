"""Weights that are stored in few bits: read back as the numbers that they stand for."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..core.errors import InputError


def check_installed(where: str) -> None:
    """Raises InputError where torchao is not installed."""
    try:
        import torchao.quantization  # noqa: F401
    except ImportError as e:
        raise InputError(
            f"{where}: weights are quantised by the package torchao ({e}). Run `pip install 'invariance[quant]'`."
        ) from None


def rounded(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """The weights that torchao holds, where they lie; a tied one in both places."""
    from torchao.utils import TorchAOBaseTensor

    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(parameter, TorchAOBaseTensor):
                yield module, name, parameter


def dequantize(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Rounded weights become the numbers that they stand for."""
    made: dict[int, nn.Parameter] = {}
    for module, name, parameter in list(rounded(model)):
        if id(parameter) not in made:
            made[id(parameter)] = nn.Parameter(parameter.to(dtype).dequantize())  # type: ignore[operator]
        setattr(module, name, made[id(parameter)])
    vars(model).pop("_weight_conversions", None)  # how they were read, which saving would revert
