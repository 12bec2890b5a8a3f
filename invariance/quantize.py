"""Weights rounded to few bits by torchao: which, how many bytes they take, and the checkpoint that holds them.

torchao has no kernels that compute in 4 bits on every device, so a rounded weight is an integer and a scale that are
multiplied whenever it is read: what is measured is what these numbers are worth, not how fast packed ones would be.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from math import gcd

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TorchAoConfig

from .checkpoint import InvarianceForCausalLM
from .errors import InputError
from .families import architecture
from .layout import Layout
from .recipe_quantize import Quantize

SCALE = torch.bfloat16  # of a scale: 16 bits, the exponents of float32


def check_installed(where: str) -> None:
    """Raises InputError where torchao is not installed."""
    try:
        import torchao.quantization  # noqa: F401
    except ImportError as e:
        raise InputError(
            f"{where}: weights are quantised by the package torchao ({e}). Run `pip install 'invariance[quant]'`."
        ) from None


def check_groups(layout: Layout, widths: Mapping[str, int], asked: Quantize, where: str) -> None:
    """Raises InputError where rows of a weight fall into no whole number of groups."""
    rows = dict(_rows(layout, widths, asked))
    odd = next((name for name, length in rows.items() if length % asked.group), None)
    if odd is None:
        return
    cut = f", or give the steps `widths: {{multiple_of: {asked.group}}}`" if widths else ""
    raise InputError(
        f"{where}: rows of {odd} have {rows[odd]} weights, which groups of {asked.group} do not divide. Take a group that "
        f"divides {gcd(*rows.values())}, as all rows do{cut}."
    )


def _rows(layout: Layout, widths: Mapping[str, int], asked: Quantize) -> Iterator[tuple[str, int]]:
    """The weights that would be rounded at these widths, each with the length of its rows."""
    kept = (*layout.gone(widths), *(f"{e}." for e in layout.architecture.embed[1:]))
    parts = {"blocks"} if asked.tables is None else {"blocks", "embedding", "head"}
    for name, axes in layout.axes.items():
        matrix = len(axes) == 2 and layout.parts[name] in parts and not name.startswith(kept)
        if matrix and axes[1] is not None:
            yield name, layout.length(axes[1], widths)


def scheme(model: PreTrainedModel, asked: Quantize) -> dict[str, int]:
    """The modules whose weights are rounded, each with its bits: linear layers and the table of the tokens.

    What no linear layer holds (norms, biases, positions, shortcuts) keeps its dtype.
    """
    inner = model.inner if isinstance(model, InvarianceForCausalLM) else model
    blocks = set(inner.get_submodule(architecture(inner.config).blocks).modules())
    table = model.get_input_embeddings()
    found = {
        path: asked.bits if module in blocks else asked.tables
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) or module is table
    }
    return {path: bits for path, bits in found.items() if bits is not None}


def packed_bytes(model: PreTrainedModel, asked: Quantize | None, stored: torch.dtype) -> int:
    """What a model takes where its weights are packed tightly: b bits each, 16 a group for its scale, and all that is not
    rounded in the dtype of the checkpoint. A tied tensor counts once."""
    bits = {} if asked is None else scheme(model, asked)
    of = {id(model.get_submodule(path).weight): b for path, b in bits.items()}
    total = 0
    for parameter in model.parameters():
        b = of.get(id(parameter))
        if b is None or asked is None:
            total += parameter.numel() * stored.itemsize
        else:
            total += -(-parameter.numel() * b // 8) + parameter.numel() // asked.group * SCALE.itemsize
    return total


def quantized(model: PreTrainedModel, asked: Quantize) -> PreTrainedModel:
    """A copy with rounded weights, which ``save_pretrained`` writes and plain transformers loads.

    A group's scale s is the least at which all its weights lie between -2ᵇ⁻¹ s and (2ᵇ⁻¹ - 1) s, rounded to 16 bits; so
    no weight moves by more than s/2.
    """
    from torchao.quantization import FqnToConfig, IntxWeightOnlyConfig, MappingType, PerGroup, quantize_
    from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer  # which imports torchao

    made = copy.deepcopy(model)
    embed, head = made.get_input_embeddings(), made.get_output_embeddings()
    tied = head.weight is embed.weight
    each = {
        path: IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=PerGroup(asked.group),
                                   mapping_type=MappingType.SYMMETRIC_NO_CLIPPING_ERR, scale_dtype=SCALE)
        for path, bits in scheme(made, asked).items()
    }  # fmt: skip
    config = FqnToConfig(each)
    quantize_(made, config, filter_fn=None)
    if tied:
        head.weight = embed.weight
    made.config.quantization_config = TorchAoConfig(config, include_input_output_embeddings=True)
    quantizer = TorchAoHfQuantizer(made.config.quantization_config, pre_quantized=True)
    quantizer.get_state_dict_and_metadata = _state  # type: ignore[method-assign]  # theirs writes tied tensors twice
    made.hf_quantizer = quantizer  # type: ignore[assignment]
    return made


def _state(model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    tied = model.all_tied_weights_keys
    return flatten_tensor_state_dict({n: t for n, t in model.state_dict().items() if n not in tied})


def rounded(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """The weights that torchao holds, where they lie; a tied one in both places."""
    from torchao.utils import TorchAOBaseTensor

    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(parameter, TorchAOBaseTensor):
                yield module, name, parameter


def dequantize(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Rounded weights become the numbers that they stand for, and the model forgets that it was quantised."""
    made: dict[int, nn.Parameter] = {}
    for module, name, parameter in list(rounded(model)):
        if id(parameter) not in made:
            made[id(parameter)] = nn.Parameter(parameter.to(dtype).dequantize())  # type: ignore[operator]
        setattr(module, name, made[id(parameter)])


def rounding_error(before: PreTrainedModel, after: PreTrainedModel) -> float:
    """‖W - Ŵ‖ / ‖W‖ over all weights that were rounded."""
    error = norm = 0.0
    paths = {id(module): path for path, module in after.named_modules()}
    for module, name, parameter in rounded(after):
        W = before.get_submodule(paths[id(module)]).get_parameter(name).detach()
        error += (W - parameter.dequantize()).double().square().sum().item()  # type: ignore[operator]
        norm += W.double().square().sum().item()
    return (error / norm) ** 0.5 if norm else 0.0
