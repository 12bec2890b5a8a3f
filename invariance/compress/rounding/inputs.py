"""What linear layers read: the second moment of their inputs, and which norm they stand behind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...core.progress import Progress, quiet
from ...io.data import Tokens

HELD_BYTES = 2**30  # of moments at a time; a larger model is walked through several times
BATCH = 8


@dataclass(eq=False)
class Inputs:
    """Layers that read the same numbers, E[x xᵀ] of those, and the norm that gives them if there is one."""

    paths: tuple[str, ...]
    norm: str | None
    moment: Float[Tensor, "m m"] = field(default_factory=lambda: torch.empty(0))


def find(model: PreTrainedModel, paths: Sequence[str], tokens: Tokens) -> list[Inputs]:
    """Which layers read the very same tensor, as one forward pass of a few tokens shows, in the order they run."""
    norms: dict[int, str] = {}
    alive: list[Tensor] = []  # so that no address is given twice
    readers: dict[int, list[str]] = {}

    def gives(path: str) -> object:
        def hook(module: nn.Module, args: object, out: object) -> None:
            if isinstance(out, Tensor):
                alive.append(out)
                norms[id(out)] = path

        return hook

    def reads(path: str) -> object:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            alive.append(args[0])
            readers.setdefault(id(args[0]), []).append(path)

        return hook

    handles = []
    for path, module in model.named_modules():
        if any(p.dim() == 1 and n == "weight" for n, p in module.named_parameters(recurse=False)):
            handles.append(module.register_forward_hook(gives(path)))  # type: ignore[arg-type]
    for path in paths:
        module = model.get_submodule(path)
        handles.append(module.register_forward_pre_hook(reads(path)))  # type: ignore[arg-type]
    try:
        with torch.no_grad():
            model(input_ids=tokens.ids[:1, :8].to(model.device), use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return [Inputs(tuple(group), norms.get(key)) for key, group in readers.items()]


def portions(model: PreTrainedModel, groups: Sequence[Inputs]) -> Iterator[list[Inputs]]:
    """Groups whose moments fit into HELD_BYTES together, in order; one that does not comes alone."""
    held, taken = 0, list[Inputs]()
    for group in groups:
        size = 4 * model.get_submodule(group.paths[0]).get_parameter("weight").shape[1] ** 2
        if taken and held + size > HELD_BYTES:
            yield taken
            held, taken = 0, []
        held, taken = held + size, [*taken, group]
    if taken:
        yield taken


@contextmanager
def _counting(
    model: PreTrainedModel, groups: Sequence[Inputs], mask: list[Tensor]
) -> Iterator[None]:
    handles = []
    for group in groups:
        module = model.get_submodule(group.paths[0])
        width = module.get_parameter("weight").shape[1]
        group.moment = torch.zeros(width, width, device=model.device)

        def hook(_: nn.Module, args: tuple[Tensor, ...], group: Inputs = group) -> None:
            x = args[0].reshape(-1, args[0].shape[-1])
            if x.shape[0] == mask[0].numel():  # an expert sees fewer tokens, all of them real
                x = x[mask[0].reshape(-1)]
            group.moment += x.float().mT @ x.float()

        handles.append(module.register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def measure(
    model: PreTrainedModel, groups: Sequence[Inputs], tokens: Tokens, progress: Progress = quiet
) -> None:
    """Fill in the moments, as means over all real tokens."""
    mask = [tokens.mask[:1]]
    batches = list(tokens.batches(BATCH))
    with _counting(model, groups, mask):
        for ids, real in progress(batches, "what layers read", len(batches)):
            mask[0] = real.to(model.device)
            padded = None if bool(real.all()) else mask[0].long()
            model(
                input_ids=ids.to(model.device),
                attention_mask=padded,
                use_cache=False,
                logits_to_keep=1,
            )
    for group in groups:
        group.moment /= int(tokens.mask.sum())
