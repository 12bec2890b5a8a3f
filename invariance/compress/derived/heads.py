"""Whole heads of a derived layout: where what they give is read, and which coordinates go with a group of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ...calibrate.tap import Found, Places
from ...model.described.description import Flat
from ...model.described.elements import blocks
from ...model.described.pattern import RIGID, expand

Groups = Sequence[Sequence[int]]


def head_places(flat: Flat, own: str, groups: Groups) -> Iterator[Found]:
    """Every matrix that reads what heads give and writes the stream: its positions, one group after the other."""
    for a in flat.carrying(own):
        others = [o for o in flat.of[a.parameter] if o.axis.dims != a.axis.dims]
        if not any(p.writes for o in others for p in o.axis.points):
            continue
        for label in a.axis.labels:
            codes = np.concatenate(
                [
                    c if s != RIGID and a.space(s) == own else np.full(len(c), -1)
                    for s, c in expand(label)
                ]
            )
            at = [np.flatnonzero(np.isin(codes, g)) for g in groups]
            if len(at[0]) and len({len(x) for x in at}) == 1:
                yield (a.parameter, a.axis.dims), Places(a, (np.concatenate(at)[None],))


def codes_of(flat: Flat, own: str, groups: Groups | None, keep: np.ndarray) -> np.ndarray:
    """The coordinates of a space that stay: of each copy those at ``keep`` [copies, k]; of heads, of whole groups."""
    if groups is not None:
        return np.sort(np.concatenate([np.asarray(groups[i]) for i in keep[0]]))
    return np.sort(np.take_along_axis(blocks(flat.spaces[own]), keep, -1).reshape(-1))


def reordered(width: int, groups: Groups, order: np.ndarray) -> np.ndarray:
    """Which coordinate comes to each one's place when groups take the order."""
    permutation = np.arange(width)
    for here, there in zip(groups, order, strict=True):
        permutation[list(here)] = groups[there]
    return permutation
