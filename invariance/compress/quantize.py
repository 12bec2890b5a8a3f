"""Weights rounded to few bits by torchao: which, how many bytes they take, and the checkpoint that holds them.

torchao has no kernels that compute in 4 bits on every device, so a rounded weight is an integer and a scale that are
multiplied whenever it is read: what is measured is what these numbers are worth, not how fast packed ones would be.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from math import gcd

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel, TorchAoConfig

from ..core.errors import InputError
from ..model.families import architecture
from ..model.layout import Layout
from ..recipe.quantize import Quantize

SCALE = torch.bfloat16  # of a scale: 16 bits, the exponents of float32


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
    gone, arch = layout.gone(widths), layout.architecture
    tables = (
        {f"{arch.embed[0]}.weight", f"{arch.head}.weight"} if asked.tables is not None else set()
    )
    for name, axes in layout.axes.items():
        rounded = name in tables or (layout.parts[name] == "blocks" and len(axes) == 2)
        if rounded and axes[-1] is not None and not name.startswith(gone):
            yield name, layout.length(axes[-1], widths)


def scheme(model: PreTrainedModel, asked: Quantize) -> dict[str, int]:
    """The modules whose weights are rounded, each with its bits: linear layers of blocks, the table of the tokens and, where
    it is another, that of the head.

    All else keeps its dtype: norms, biases, positions, shortcuts, and the k×k matrix before a tied head, whose diagonal
    stands out.
    """
    blocks = set(model.get_submodule(architecture(model.config).blocks).modules())
    embed, head = model.get_input_embeddings(), model.get_output_embeddings()
    tables = {embed} if head.weight is embed.weight else {embed, head}
    found = {
        path: asked.tables if module in tables else asked.bits
        for path, module in model.named_modules()
        if module in tables or (isinstance(module, nn.Linear) and module in blocks)
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
            total += (
                -(-parameter.numel() * b // 8) + parameter.numel() // asked.group * SCALE.itemsize
            )
    return total


def quantized(model: PreTrainedModel, asked: Quantize) -> PreTrainedModel:
    """A copy with rounded weights, which ``save_pretrained`` writes and plain transformers loads."""
    from torchao.quantization import FqnToConfig, IntxWeightOnlyConfig, MappingType, PerGroup
    from transformers.quantizers.quantizer_torchao import (
        TorchAoHfQuantizer,  # which imports torchao
    )

    made = copy.deepcopy(model)
    embed, head = made.get_input_embeddings(), made.get_output_embeddings()
    tied, each = head.weight is embed.weight, scheme(made, asked)
    for path, bits in each.items():
        module = made.get_submodule(path)
        module.weight = nn.Parameter(
            _round(module.get_parameter("weight").detach(), bits, asked.group), requires_grad=False
        )
    if tied:
        head.weight = embed.weight
    like = {
        bits: IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, f"int{bits}"),
            granularity=PerGroup(asked.group),
            mapping_type=MappingType.SYMMETRIC_NO_CLIPPING_ERR,
            scale_dtype=SCALE,
        )
        for bits in set(each.values())
    }
    made.config.quantization_config = TorchAoConfig(
        FqnToConfig({path: like[bits] for path, bits in each.items()}),
        include_input_output_embeddings=True,
    )
    quantizer = TorchAoHfQuantizer(made.config.quantization_config, pre_quantized=True)
    quantizer.get_state_dict_and_metadata = _state  # type: ignore[method-assign]  # theirs writes tied tensors twice
    made.hf_quantizer = quantizer  # type: ignore[assignment]
    return made


def _round(W: Float[Tensor, "n m"], bits: int, group: int) -> Tensor:
    """The weights as integers and scales. A group's scale s is the least at which all its weights lie between -2ᵇ⁻¹ s and
    (2ᵇ⁻¹ - 1) s, rounded to 16 bits, so that no weight moves by more than s/2.

    torchao would divide by scales that it has rounded in 16 bits too, which at 8 bits moves weights by up to s.
    """
    from torchao.quantization import IntxUnpackedToInt8Tensor

    runs, top = W.float().unflatten(1, (-1, group)), 2 ** (bits - 1)
    least = torch.maximum(runs.amax(-1) / (top - 1), runs.amin(-1) / -top).clamp_min(
        torch.finfo(SCALE).tiny
    )
    scale = least.to(SCALE)
    made = IntxUnpackedToInt8Tensor.from_hp(
        W.float(),
        (1, group),
        getattr(torch, f"int{bits}"),
        custom_scale=scale.float(),
        custom_zero_point=torch.zeros_like(scale, dtype=torch.int8),
        intx_choose_qparams_algorithm=None,
    ).to(W.dtype)
    made.scale = scale
    return made


def _state(model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    tied = model.all_tied_weights_keys
    return flatten_tensor_state_dict({n: t for n, t in model.state_dict().items() if n not in tied})


def rounding_error(before: PreTrainedModel, after: PreTrainedModel, asked: Quantize) -> float:
    """‖W - Ŵ‖ / ‖W‖ over all weights that were rounded."""
    error = norm = 0.0
    for path in scheme(before, asked):
        W, Q = (
            model.get_submodule(path).get_parameter("weight").detach() for model in (before, after)
        )
        error += (W - Q.dequantize()).double().square().sum().item()  # type: ignore[operator]
        norm += W.double().square().sum().item()
    return (error / norm) ** 0.5 if norm else 0.0
