"""Nested members under training: each a model of its own shapes that runs on parts of one student's weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from ..compress.nested import first
from ..core.change import Change
from ..model.labels import label
from ..model.layout import Layout
from ..model.reparametrize import along, contract, reparametrize
from ..recipe.recover import Recover
from .adapt import adapt

Kept = tuple[
    Int[Tensor, " k"] | None, ...
]  # which entries of each axis of a weight stay; None for all


class Member(nn.Module):
    """A student at narrower widths: its modules, and at every call those parts of the student's weights that it keeps,
    so that gradients reach the student.

    Made of the student before ``adapt`` made that ready for training, which it is made ready for alike. Nothing of it
    is trained itself or kept in checkpoints.
    """

    def __init__(self, student: PreTrainedModel, layout: Layout, widths: Mapping[str, int]) -> None:
        super().__init__()
        changes = first(layout, widths)
        self.twin = copy.deepcopy(student)
        reparametrize(self.twin, layout, changes)
        self.layout = label(self.twin)
        self.kept = _kept(layout, changes)
        self.parts: dict[str, Kept] = {}

    def adapt(self, options: Recover, seed: int) -> None:
        """Make ready for training as the student, and let the copies of its weights go.

        A shortcut that the student has not only picks directions; it stays here, as a constant.
        """
        adapt(self.twin, self.layout, options, seed)
        self.twin.requires_grad_(False)
        for name, p in self.twin.named_parameters():
            if name in self.kept or not name.endswith(".shortcut"):
                self.parts[name] = self._part(name, len(p))
                p.data = p.data.new_empty(0)

    def _part(self, name: str, length: int) -> Kept:
        """What stays of a weight of the student; of an adapter's, what stays of the matrix beside it."""
        path, _, adapter = name.removesuffix(".default.weight").rpartition(".lora_")
        if path:
            written, read = self.kept[f"{path}.weight"]
            return (None, read) if adapter == "A" else (written, None)
        found = self.kept.get(name.replace(".base_layer.", "."))
        return (torch.arange(length),) if found is None else found  # a gain for training alone

    def forward(self, student: PreTrainedModel, **inputs: Any) -> Any:
        """What it makes of tokens, by the student's weights as they are."""
        theirs = dict(student.named_parameters())
        weights = {name: _cut(theirs[name], kept) for name, kept in self.parts.items()}
        return functional_call(self.twin, weights, args=(), kwargs=inputs)


def _kept(layout: Layout, changes: Mapping[str, Change]) -> dict[str, Kept]:
    """What stays of each labelled weight when spaces keep their first directions."""
    gone = layout.gone({name: change.width for name, change in changes.items()})
    found: dict[str, Kept] = {}
    for name, axes in layout.axes.items():
        if not name.startswith(gone):
            kept: list[Tensor | None] = []
            for length, axis in zip(layout.shapes[name], axes, strict=True):
                places = torch.arange(length, dtype=torch.float64)
                for part, change in [] if axis is None else along(axis, changes):
                    places = contract(places, 0, part, change)
                kept.append(None if len(places) == length else places.long())
            found[name] = tuple(kept)
    return found


def _cut(weight: Tensor, kept: Kept) -> Tensor:
    for axis, places in enumerate(kept):
        if places is not None:
            weight = weight.index_select(axis, places.to(weight.device))
    return weight


def sandwich(members: int, seed: int) -> list[int]:
    """Which of so many members, the widest first, a step trains: the widest, the narrowest, and one between at random.

    Source: Yu and Huang 2019, arXiv:1903.05134, section 3.2 (universally slimmable networks): bounds of the members'
    performance from above and from below are trained at every step. That weights serve as prefixes of one another is
    Kusupati et al. 2022, arXiv:2205.13147 (Matryoshka representations).
    """
    if members < 3:
        return list(range(members))
    g = torch.Generator().manual_seed(seed)
    return [0, 1 + int(torch.randint(members - 2, (), generator=g)), members - 1]
