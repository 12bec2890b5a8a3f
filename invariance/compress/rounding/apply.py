"""A copy of a model with rounded weights, and the checkpoint that holds them.

torchao has no kernels that compute in 4 bits on every device, so a rounded weight is an integer and a scale that are
multiplied whenever it is read: what is measured is what these numbers are worth, not how fast packed ones would be.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel, TorchAoConfig

from ...core.progress import Progress, quiet
from ...io.data import Tokens
from ...io.rounded import rounded
from ...method.interfaces import find
from ...method.rounding import SCALE, Grid, Rounded, Rounding, ScaledRounding
from ...recipe.quantize import Quantize
from . import inputs
from .scheme import scheme, table_modules

PROBED = 16  # tokens that show whether scaling a norm and its readers changes nothing
EXACT = 1e-3  # of the logits' norm: rounding in float32, not another model


def quantized(
    model: PreTrainedModel,
    asked: Quantize,
    tokens: Tokens | None = None,
    progress: Progress = quiet,
) -> PreTrainedModel:
    """A copy with rounded weights, which ``save_pretrained`` writes and plain transformers loads. ``tokens`` are what a
    rounding that reads moments measures them on."""
    return round_model(model, asked, tokens, progress).model


@dataclass(frozen=True)
class Made:
    """A copy with rounded weights, and ‖W − Ŵ‖ / ‖W‖ over all weights that were rounded, scaled ones as they were then."""

    model: PreTrainedModel
    error: float


@dataclass
class _Error:
    """Sums of squares."""

    moved: float = 0.0
    norm: float = 0.0

    def add(self, W: Tensor, found: Rounded) -> None:
        self.moved += (found.values - W).double().square().sum().item()
        self.norm += W.double().square().sum().item()


def round_model(
    model: PreTrainedModel,
    asked: Quantize,
    tokens: Tokens | None = None,
    progress: Progress = quiet,
) -> Made:
    """``quantized``, and how far weights have moved."""
    made, moved = copy.deepcopy(model), _Error()
    tied = made.get_output_embeddings().weight is made.get_input_embeddings().weight
    tables, each = table_modules(made), scheme(made, asked)
    blocks = {path: bits for path, bits in each.items() if made.get_submodule(path) not in tables}
    found_each = _blocks(made, blocks, asked, tokens, progress, moved)
    to_nearest: Rounding = find("round", "nearest")()
    for path, bits in each.items():
        if path not in blocks:
            W = made.get_submodule(path).get_parameter("weight").detach()
            found_each[path] = to_nearest.round(W, None, Grid(bits, asked.group))
            moved.add(W, found_each[path])
    on_grid = {}
    for path, found in found_each.items():
        module = made.get_submodule(path)
        module.weight = _stored(found, each[path], asked.group, module.get_parameter("weight"))
        if found.scales is not None:
            on_grid[path] = each[path]
    if tied:
        made.get_output_embeddings().weight = made.get_input_embeddings().weight
    if on_grid:
        _configure(made, on_grid, asked.group)
    return Made(made, (moved.moved / moved.norm) ** 0.5 if moved.norm else 0.0)


def _blocks(
    made: PreTrainedModel,
    bits: Mapping[str, int],
    asked: Quantize,
    tokens: Tokens | None,
    progress: Progress,
    moved: _Error,
) -> dict[str, Rounded]:
    """The weights of the blocks, rounded; where moments are read, on what comes in behind those rounded before."""
    how, found = asked.round, dict[str, Rounded]()
    if not how.reads:
        for path, b in bits.items():
            W = made.get_submodule(path).get_parameter("weight").detach()
            found[path] = how.round(W, None, Grid(b, asked.group))
            moved.add(W, found[path])
        return found
    assert tokens is not None  # the recipe has been checked
    for portion in inputs.portions(made, inputs.find(made, list(bits), tokens)):
        inputs.measure(made, portion, tokens, progress)
        for group in progress(portion, f"round by {how.name}", len(portion)):
            C = group.moment
            if isinstance(how, ScaledRounding) and group.norm is not None:
                C = _scale(made, group, how, Grid(bits[group.paths[0]], asked.group), tokens)
            for path in group.paths:
                weight = made.get_submodule(path).get_parameter("weight")
                one = found[path] = how.round(weight.detach(), C, Grid(bits[path], asked.group))
                moved.add(weight.detach(), one)
                weight.data = one.values.to(weight.dtype)
            group.moment = torch.empty(0)
    return found


@torch.no_grad()
def _scale(
    made: PreTrainedModel,
    group: inputs.Inputs,
    how: ScaledRounding,
    grid: Grid,
    tokens: Tokens,
) -> Float[Tensor, "m m"]:
    """Scale what reads a norm, and the norm back, where that changes nothing; the second moment of what comes in then."""
    assert group.norm is not None
    gains = list(made.get_submodule(group.norm).parameters(recurse=False))
    readers = [made.get_submodule(path).get_parameter("weight") for path in group.paths]
    s = how.channel_scales([w.detach() for w in readers], group.moment, grid)
    ids = tokens.ids[:1, :PROBED].to(made.device)
    kept = [p.detach().clone() for p in (*gains, *readers)]
    before = made(input_ids=ids, use_cache=False).logits
    for parameter in gains:
        parameter.div_(s)
    for weight in readers:
        weight.mul_(s)
    after = made(input_ids=ids, use_cache=False).logits
    if (after - before).norm() <= EXACT * before.norm():
        return group.moment / s / s[:, None]
    for parameter, value in zip((*gains, *readers), kept, strict=True):
        parameter.copy_(value)  # something else reads the norm, or its gain is 1 + w
    return group.moment


def _stored(found: Rounded, bits: int, group: int, like: Tensor) -> nn.Parameter:
    """The weight as the checkpoint holds it: integers and scales, or with a mask, the numbers themselves.

    torchao would divide by scales that it has rounded in 16 bits too, which at 8 bits moves weights by up to s.
    """
    if found.scales is None:
        return nn.Parameter(found.values.to(like.dtype), requires_grad=False)
    from torchao.quantization import IntxUnpackedToInt8Tensor

    scales = found.scales.to(SCALE)
    made = IntxUnpackedToInt8Tensor.from_hp(
        found.values.float(),
        (1, group),
        getattr(torch, f"int{bits}"),
        custom_scale=scales.float(),
        custom_zero_point=torch.zeros_like(scales, dtype=torch.int8),
        intx_choose_qparams_algorithm=None,
    ).to(like.dtype)
    made.scale = scales
    return nn.Parameter(made, requires_grad=False)


def _configure(made: PreTrainedModel, bits: Mapping[str, int], group: int) -> None:
    """Say in the config how the weights are stored, and how they are saved."""
    from torchao.quantization import FqnToConfig, IntxWeightOnlyConfig, MappingType, PerGroup
    from transformers.quantizers.quantizer_torchao import (
        TorchAoHfQuantizer,  # which imports torchao
    )

    like = {
        b: IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, f"int{b}"),
            granularity=PerGroup(group),
            mapping_type=MappingType.SYMMETRIC_NO_CLIPPING_ERR,
            scale_dtype=SCALE,
        )
        for b in set(bits.values())
    }
    made.config.quantization_config = TorchAoConfig(
        FqnToConfig({path: like[b] for path, b in bits.items()}),
        include_input_output_embeddings=True,
    )
    quantizer = TorchAoHfQuantizer(made.config.quantization_config, pre_quantized=True)
    quantizer.get_state_dict_and_metadata = _state  # type: ignore[method-assign]  # theirs writes tied tensors twice
    made.hf_quantizer = quantizer  # type: ignore[assignment]


def _state(model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    tied = model.all_tied_weights_keys
    return flatten_tensor_state_dict({n: t for n, t in model.state_dict().items() if n not in tied})


def rounding_error(before: PreTrainedModel, after: PreTrainedModel, asked: Quantize) -> float:
    """‖W - Ŵ‖ / ‖W‖ over all weights that were rounded."""
    held = {id(module): numbers for module, _, numbers in rounded(after)}
    error = norm = 0.0
    for path in scheme(before, asked):
        W = before.get_submodule(path).get_parameter("weight").detach()
        module = after.get_submodule(path)
        numbers = held.get(id(module))
        found = module.get_parameter("weight") if numbers is None else numbers.dequantize()  # type: ignore[operator]
        error += (W - found).double().square().sum().item()
        norm += W.double().square().sum().item()
    return (error / norm) ** 0.5 if norm else 0.0
