"""Which weights recovery trains, made ready for it, and put back afterwards into the form that is exported."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..core.errors import InputError
from ..model.folding import fold_again
from ..model.layout import Layout
from ..model.modules import Norm, Stage
from ..recipe.recover import Recover


def adapt(model: PreTrainedModel, layout: Layout, options: Recover, seed: int) -> None:
    """Let the weights that ``options`` name be trained, and no others; adapters are added where they are asked for.

    A folded model's norms have no gains; to be trained they get gains of one, which ``settle`` folds away again.
    """
    model.requires_grad_(False)
    if options.weights == "lora":
        from peft import LoraConfig, inject_adapter_in_model

        asked = options.adapters
        config = LoraConfig(
            r=asked.rank,
            lora_alpha=asked.alpha,  # type: ignore[arg-type]
            lora_dropout=asked.dropout,
            target_modules=adapted(layout),
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_adapter_in_model(config, model)
        model.eval()  # adapters come in training mode
    elif options.weights == "full":
        model.requires_grad_(True)
    else:
        like = next(model.parameters())
        for norm, width in norms(model, layout):
            if layout.folded:
                norm.gain = nn.Parameter(torch.ones(width, dtype=like.dtype, device=like.device))
            norm.requires_grad_(True)
        for stage in layout.shortcuts:
            model.get_parameter(f"{stage}.shortcut").requires_grad_(True)
    if not any(p.requires_grad for p in model.parameters()):
        raise InputError(
            f"recover.weights: {options.weights}: this model has no such weights. Train `lora` or `full`."
        )


@torch.no_grad()
def settle(model: PreTrainedModel, layout: Layout, options: Recover) -> dict[str, Tensor]:
    """Undo ``adapt`` in float64, keeping what was learned. Returns the weights that changed, by name."""
    model.double()
    if options.weights == "full":
        return {name: p.detach() for name, p in model.named_parameters()}
    if options.weights == "lora":
        for path in adapted(layout):
            layer = model.get_submodule(path)
            layer.merge(safe_merge=True)  # type: ignore[operator]
            model.set_submodule(path, layer.get_base_layer())  # type: ignore[operator]
        changed = [f"{path}.weight" for path in adapted(layout)]
    else:
        changed = [n for n, p in model.named_parameters() if p.requires_grad]
        if layout.folded:
            fold_again(model, layout)
            changed = [n for point in layout.points for n, _ in layout.readers(point)]
    return {name: model.get_parameter(name).detach() for name in changed}


def adapted(layout: Layout) -> list[str]:
    """The matrices of the blocks, shortcuts left out: those that get an adapter."""
    return [
        name.removesuffix(".weight")
        for name, axes in layout.axes.items()
        if len(axes) == 2 and name.endswith(".weight") and layout.parts[name] == "blocks"
    ]


def norms(model: PreTrainedModel, layout: Layout) -> list[tuple[Norm, int]]:
    """The norms of a restructured model, and how wide the stream is that they read."""
    found = [
        (model.get_submodule(f"{e.stage}.norm"), e.source)
        for e in layout.edges
        if _has_norm(model, e.stage)
    ]
    final = model.get_submodule(layout.architecture.final_norm)
    found.append((final[0] if isinstance(final, nn.Sequential) else final, layout.points[-1]))
    return [(norm, layout.spaces[point].dim) for norm, point in found if isinstance(norm, Norm)]


def _has_norm(model: PreTrainedModel, path: str) -> bool:
    stage = model.get_submodule(path)
    return isinstance(stage, Stage) and stage.norm is not None
