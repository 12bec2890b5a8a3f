"""Bases that a run has fitted as elements of a layout's groups."""

from __future__ import annotations

import numpy as np
import torch

from ...core.operator import Operator
from ...core.pick import Pick
from ...model.described.description import Kind
from ...model.described.elements import Element, blocks
from ...model.described.turn import positions
from .heads import reordered
from .layout import DerivedLayout


def as_element(layout: DerivedLayout, name: str, A: Operator) -> Element:
    """What the layout does to a space whose signal x becomes Aᵀx.

    A reader's row w becomes A⁻¹w. It gets M w where the layout writes the space plainly there, M⁻ᵀw where inverted.
    """
    own = layout.own[name]
    space = layout.description.flat().spaces[own]
    still = tuple(torch.ones(space.width, dtype=torch.float64) for _ in space.scales)
    if A.picks is None:
        M = A.matrix()
        plain = space.kind is Kind.GL and not _inverted(layout, name)
        made = torch.linalg.inv(M) if plain else M.mT
        return Element(matrices=made.contiguous(), scales=still)
    if name in layout.groups:
        order = reordered(space.width, layout.groups[name], A.picks[0].numpy())
        return Element(permutation=order, scales=still)
    permutation = np.arange(space.width)
    for block, order in zip(blocks(space), A.picks.numpy(), strict=True):
        permutation[block] = block[order]
    return Element(permutation=permutation, scales=still)


def moving(layout: DerivedLayout, name: str, A: Operator) -> Element:
    """The same; for an order that leaves all heads in place, one that does not."""
    made, picks = as_element(layout, name, A), A.picks
    if not is_still(made) or picks is None or name not in layout.groups:
        return made
    return as_element(layout, name, Pick(picks.roll(1, -1), picks.shape[1]))


def is_still(element: Element) -> bool:
    """Whether an element changes nothing."""
    p = element.permutation
    return element.matrices is None and p is not None and bool((p == np.arange(len(p))).all())


def _inverted(layout: DerivedLayout, name: str) -> bool:
    """Whether the layout inverts what it does to a space at its readers that write the stream."""
    flat, own = layout.description.flat(), layout.own[name]
    for (parameter, _), place in layout.places(name):
        others = [o for o in flat.of[parameter] if o.axis.dims != place.axis.axis.dims]
        if any(p.writes for o in others for p in o.axis.points):
            for label in place.axis.axis.labels:
                for symbol in positions(place.axis, label, {own}):
                    return symbol.powers == (-1,)
    return False
