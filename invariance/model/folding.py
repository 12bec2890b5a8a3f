"""The canonical form: blocks rewritten, gains and biases of norms folded into their readers, writers centred. Exact."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..core.errors import InputError, did_you_mean
from .architecture import Architecture
from .axes import Role
from .labelling import labelled
from .layout import Layout
from .modules import Block, Factored, Linear, Norm, Stage, factors
from .vocabulary import LEAVES, Head

WRITERS = ("out", "down")  # the linear layers of a branch that write the stream; all others read it


def canonical(
    model: PreTrainedModel,
    arch: Architecture,
    *,
    fold: bool,
    tie: str = "untie",
    split: Collection[str] = (),
) -> Layout:
    """Rewrite a model of an architecture in place, without changing its function; see ``canonicalize``."""
    if tie not in ("keep", "untie"):
        raise InputError(f"tie '{tie}' is not known. Use 'keep' or 'untie'.")
    blocks = model.get_submodule(arch.blocks)
    if not any(isinstance(m, Block) for m in blocks.children()):
        arch.restructure(model)
    layout = labelled(model, arch)
    if new := [name for name in split if name not in layout.spaces]:
        _split(model, layout.matrices, new)
        layout = labelled(model, arch)
    if not fold or layout.folded:
        return layout
    if layout.tied and layout.centred and tie == "keep":
        raise InputError(
            f"tie: keep cannot hold for model type '{model.config.model_type}': its LayerNorm needs a centred "
            "embedding, and its head reads the table uncentred. Use `tie: untie`."
        )
    with torch.no_grad():
        _fold_stages(model, layout)
        _fold_head(model, layout, tie)
        if layout.centred:
            _centre(model, labelled(model, arch))
    return labelled(model, arch)


def _split(model: PreTrainedModel, matrices: Mapping[str, str], names: list[str]) -> None:
    for name in names:
        if name not in matrices:
            raise InputError(
                f"no matrix of this model makes a space '{name}'{did_you_mean(name, matrices)}"
            )
        linear = model.get_submodule(matrices[name])
        assert isinstance(linear, nn.Linear)
        model.set_submodule(matrices[name], Factored.split(linear))


@torch.no_grad()
def join(module: nn.Module) -> None:
    """Make one matrix of two factors that store no less than it: the inverse of ``split``."""
    found = [(n, m) for n, m in module.named_modules() if isinstance(m, Factored)]
    for name, pair in found:
        first, second = pair.first.weight, pair.second.weight
        if first.numel() + second.numel() >= pair.in_features * pair.out_features:
            module.set_submodule(name, pair.joined())


def fold_norm(norm: Norm, readers: Sequence[Linear]) -> None:
    """W(γ ⊙ n + β) + b = (W diag γ) n + (b + Wβ), in float64; of two factors the first has γ, the second the bias.

    γ is the norm's offset plus its gain."""
    for reader in readers:
        first, last = factors(reader)[0], factors(reader)[-1]
        if norm.bias is not None:
            bias = norm.bias.double()
            for factor in factors(reader):
                bias = factor.weight.double() @ bias
            if last.bias is not None:
                bias = bias + last.bias.double()
            last.bias = _like(bias, last.weight)
        if norm.gain is not None:
            first.weight = _like(
                first.weight.double() * (norm.offset + norm.gain.double()), first.weight
            )
    norm.gain = norm.bias = None
    norm.offset = 0.0


def _fold_stages(model: PreTrainedModel, layout: Layout) -> None:
    for edge in layout.edges:
        stage = model.get_submodule(edge.stage)
        assert isinstance(stage, Stage)
        fold_stage(stage)


def fold_stage(stage: Stage) -> None:
    """Fold the gain and bias of a stage's norm into its readers, those that are on its device."""
    if stage.norm is not None:
        readers = [m for n, m in stage.linears().items() if n not in WRITERS]
        gain = stage.norm.gain if stage.norm.gain is not None else stage.norm.bias
        there = [m for m in readers if gain is None or factors(m)[0].weight.device == gain.device]
        fold_norm(stage.norm, there)


def centre_stage(stage: Stage) -> None:
    """Take the mean out of all that a stage writes to the stream, as ``_centre`` does of a whole model."""
    for name, linear in stage.linears().items():
        if name in WRITERS:
            last = factors(linear)[-1]
            last.weight = _like(centred(last.weight.double(), 0), last.weight)
            if last.bias is not None:
                last.bias = _like(centred(last.bias.double(), 0), last.bias)
    for module in stage.modules():
        if isinstance(module, Norm):
            module.centred = False


def centred(W: Tensor, dim: int) -> Tensor:
    """A weight without its mean along the axis that writes the stream."""
    return W - W.mean(dim, keepdim=True)


@torch.no_grad()
def fold_again(model: PreTrainedModel, layout: Layout) -> None:
    """Fold the gains that norms of a folded model have got since, its final one too, into what reads them."""
    _fold_stages(model, layout)
    norm: nn.Module = model.get_submodule(layout.architecture.final_norm)
    reader: nn.Module = model.get_submodule(layout.architecture.head)
    if isinstance(norm, nn.Sequential):  # a tied head is read through a matrix of its own
        norm, reader = norm.children()
    assert isinstance(norm, Norm) and isinstance(reader, nn.Linear | Head)
    _fold_closing(norm, reader)


def _fold_head(model: PreTrainedModel, layout: Layout, tie: str) -> None:
    arch = layout.architecture
    head, norm = model.get_submodule(arch.head), model.get_submodule(arch.final_norm)
    assert isinstance(head, nn.Linear | Head) and isinstance(norm, Norm)
    if layout.tied and tie == "keep":
        mix = nn.Linear(
            norm.d, norm.d, bias=False, device=head.weight.device, dtype=head.weight.dtype
        )
        mix.weight = _like(
            torch.eye(norm.d, device=head.weight.device, dtype=torch.float64), head.weight
        )
        fold_norm(norm, [mix])
        model.set_submodule(arch.final_norm, nn.Sequential(norm, mix))
        return
    if layout.tied:
        for leaf in LEAVES if isinstance(head, Head) else ("weight",):
            own = head.get_parameter(leaf)
            setattr(head, leaf, _like(own.double().clone(), own))
        model.config.tie_word_embeddings = False
        model._tied_weights_keys = (
            model.all_tied_weights_keys
        ) = {}  # else transformers ties them again
    _fold_closing(norm, head)


def _fold_closing(norm: Norm, head: nn.Linear | Head) -> None:
    """``fold_norm`` into the head; where its last rows are two factors, what reads the signal has the gain."""
    if isinstance(head, nn.Linear):
        fold_norm(norm, [head])
        return
    if norm.bias is not None:
        bias = head.weight.double() @ norm.bias.double()
        bias = bias if head.bias is None else bias + head.bias.double()
        head.bias = _like(bias, head.common)
    if norm.gain is not None:
        gain = norm.offset + norm.gain.double()
        head.common, head.basis = (_like(p.double() * gain, p) for p in (head.common, head.basis))
    fold_norm(norm, [])


def _centre(model: PreTrainedModel, layout: Layout) -> None:
    """Take the mean out of all that writes the stream, so that LayerNorm finds nothing to subtract."""
    for name, axes in layout.axes.items():
        for i, axis in enumerate(axes):
            if (
                axis is not None
                and axis.role is Role.WRITE
                and layout.spaces[axis.space].kind == "residual"
            ):
                assign(model, name, centred(model.get_parameter(name).double(), i))
    for module in model.modules():
        if isinstance(module, Norm):
            module.centred = False


def assign(model: nn.Module, name: str, value: Tensor) -> None:
    """Put a tensor in a parameter's place, whatever its shape, in the parameter's dtype."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    parameter = _like(value, module.get_parameter(leaf))
    setattr(module, leaf, parameter)
    if isinstance(module, nn.Linear) and leaf == "weight":
        module.out_features, module.in_features = parameter.shape
    if isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = parameter.shape


def _like(value: Tensor, parameter: Tensor) -> nn.Parameter:
    return nn.Parameter(
        value.to(parameter.dtype).contiguous(), requires_grad=parameter.requires_grad
    )
