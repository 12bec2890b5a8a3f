"""What a model in memory must be before anything is computed from it: each fault by name, with its remedy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from ..core.errors import InputError
from .vocabulary import is_tied

WRAPPERS = {
    "DataParallel": "Give the model inside, `model.module`",
    "DistributedDataParallel": "Give the model inside, `model.module`",
    "FullyShardedDataParallel": "Give the model before it is sharded",
    "OptimizedModule": "Give the model before `torch.compile`, `model._orig_mod`",
    "ScriptModule": "Give the model before `torch.jit`",
}
MERGE = "Merge the adapter first: `model = model.merge_and_unload()`"


def check_model(model: object, where: str = "model") -> PreTrainedModel:
    """The model, if it can be worked on. Raises InputError."""
    for fault in _faults(model):
        raise InputError(f"{where}: {fault}.")
    assert isinstance(model, PreTrainedModel)
    return model


def _faults(model: object) -> Iterator[str]:
    kind = type(model).__name__
    if not isinstance(model, nn.Module):
        yield f"got {kind}, which is no model of PyTorch. Load one: `invariance.load(name)`"
        return
    yield from _wrapped(model)
    if not isinstance(model, PreTrainedModel):
        yield f"{kind} is no model of transformers. Give what `AutoModelForCausalLM.from_pretrained` gives"
        return
    if model.get_output_embeddings() is None:
        yield f"{kind} has no head over the vocabulary. Load it by `AutoModelForCausalLM`"
    for check in (_parameters, _places, _sharing, _numbers):
        yield from check(model)


def _wrapped(model: nn.Module) -> Iterator[str]:
    """Wrappers around the model or a part of it, and adapters in it."""
    for name, module in model.named_modules():
        mro = type(module).__mro__
        place = f" at '{name}'" if name else ""
        if any(c.__module__.partition(".")[0] == "peft" for c in mro):
            yield f"it holds an adapter of PEFT ({type(module).__name__}{place}). {MERGE}"
        for c in mro:
            if c.__name__ in WRAPPERS and c.__module__.startswith("torch."):
                yield f"it is wrapped in {c.__name__}{place}. {WRAPPERS[c.__name__]}"
        if parametrize.is_parametrized(module):
            yield (
                f"'{name}' is parametrized, so its weights are computed anew each time. Remove that first: "
                "`torch.nn.utils.parametrize.remove_parametrizations`"
            )
        if any(key.endswith("_orig") for key in module._parameters):
            yield (
                f"'{name}' is pruned by a mask that is not applied yet. Apply it: "
                "`torch.nn.utils.prune.remove(module, 'weight')`"
            )


def _parameters(model: nn.Module) -> Iterator[str]:
    for name, p in model.named_parameters():
        kind = next(
            (t for t in (type(p), type(p.data)) if t not in (nn.Parameter, torch.Tensor)), None
        )
        if p.is_meta:
            yield (
                f"the weights of '{name}' are not in memory (offloaded, or on the meta device). Load the model whole: "
                "without `device_map`, or with `device_map='cpu'`"
            )
        elif kind is not None:
            yield (
                f"'{name}' is stored as {kind.__name__}, and not as plain numbers. Give the model before it was quantized or "
                "sharded, or save it and load it by `invariance.load`, which reads torchao's"
            )
        elif not p.is_floating_point():
            yield f"'{name}' holds {p.dtype}, which cannot change its basis. Give the floating-point model"


def _places(model: nn.Module) -> Iterator[str]:
    devices = sorted({str(p.device) for p in model.parameters()})
    if len(devices) > 1:
        yield f"its weights lie on {', '.join(devices)}. Put it on one: `model.to('{devices[0]}')`"


def _sharing(model: PreTrainedModel) -> Iterator[str]:
    """Modules and weights that stand in two places, and a config that says otherwise of the head."""
    modules = Counter(
        id(m)
        for _, m in model.named_modules(remove_duplicate=False)
        if next(m.parameters(), None) is not None
    )
    for name, module in model.named_modules():
        if modules[id(module)] > 1:
            yield (
                f"the module '{name}' stands in {modules[id(module)]} places, and would change in all of them. Give each a copy "
                "of its own: `copy.deepcopy`"
            )
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = table is not None and head is not None and is_tied(table, head)
    said = bool(model.config.get_text_config().tie_word_embeddings)
    if tied and not said:  # the other way round, the weights say what holds
        yield (
            "its config says tie_word_embeddings=False, and its head is the embedding table. Say what holds: "
            "`model.config.tie_word_embeddings = True`"
        )
    own = {id(p) for p in table.parameters()} if tied else set[int]()
    seen: dict[int, str] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        other = seen.setdefault(id(p), name)
        if other != name and not (tied and id(p) in own):
            yield f"'{name}' is the same weight as '{other}'. Give it one of its own: `nn.Parameter(weight.clone())`"


def _numbers(model: nn.Module) -> Iterator[str]:
    for name, p in model.named_parameters():
        if not torch.isfinite(p.detach()).all():
            yield f"'{name}' holds NaN or infinite numbers, and nothing can be computed from it. Give another model"
