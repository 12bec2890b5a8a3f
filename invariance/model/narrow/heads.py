"""Heads made narrower: queries, keys and values alike, as the family's own modules want them."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from ...core.errors import InputError
from ..derive.certify import TOLERANCE, distance, outputs
from ..derive.trace import Example
from ..described.description import Description, Flat, Kind, Space
from ..described.elements import blocks
from ..described.turn import positions
from ..described.weightless import stored
from .attributes import OfHeads, of_heads
from .cut import Cut, cut, narrow_buffer, plan, stay, zero
from .positions import Kept


@dataclass(frozen=True)
class Heads:
    """The spaces of one layer's heads: values, queries and keys, and pairs that positions turn."""

    values: str
    plain: str | None  # queries and keys without positions
    turned: str | None  # pairs

    @property
    def names(self) -> list[str]:
        return [n for n in (self.values, self.plain, self.turned) if n is not None]


def heads(flat: Flat) -> list[Heads]:
    """Of each layer, the spaces that make its heads; only where queries, keys and values are of one width."""
    layers = defaultdict[str, dict[str, tuple[str, Space]]](dict)
    for name, space in flat.spaces.items():
        stem, _, layer = name.partition("@")
        stem = stem.rstrip("0123456789")
        if space.kind in (Kind.GL, Kind.C) and stem in ("qk", "vo"):
            layers[layer][f"{stem} {space.kind.value}"] = name, space
    made = []
    for found in layers.values():
        if "vo GL" not in found:
            continue
        values, vo = found["vo GL"]
        plain, turned = found.get("qk GL"), found.get("qk C")
        count = vo.copies
        qk = sum(s.width for _, s in (x for x in (plain, turned) if x is not None))
        if qk == vo.width and all(x is None or x[1].width % count == 0 for x in (plain, turned)):
            made.append(Heads(values, plain and plain[0], turned and turned[0]))
    return made


def narrower(flat: Flat, of: Heads, by: int) -> Kept:
    """Each head without its last ``by`` coordinates; of queries and keys, those without positions go first."""
    vo = flat.spaces[of.values]
    count = vo.copies
    kept = {of.values: _first(vo, vo.width // count - by)}
    rest = by
    if of.plain is not None:
        space = flat.spaces[of.plain]
        n = space.width // count
        if n > by or (n == by and of.turned is None):
            kept[of.plain], rest = _first(space, n - by), 0
    if rest and of.turned is not None:
        space = flat.spaces[of.turned]
        pairs = blocks(space).reshape(count, -1, 2)
        if rest % 2 or pairs.shape[1] <= rest // 2:
            raise InputError(
                f"cut: {of.turned} loses pairs, so {by} cannot go. Cut an even number."
            )
        kept[of.turned], rest = np.sort(pairs[:, : pairs.shape[1] - rest // 2].reshape(-1)), 0
    if rest:
        raise InputError(f"cut: the heads of {of.values} are no wider than {by}.")
    return kept


def _first(space: Space, n: int) -> np.ndarray:
    return np.sort(blocks(space)[:, :n].reshape(-1))


def cut_heads(
    model: PreTrainedModel, description: Description, by: int, example: Example
) -> tuple[PreTrainedModel, Cut, float]:
    """A copy with narrower heads in all layers, what was done, and its distance from the model with zeros.

    Where a module scales scores by the width that it sees, the queries take up what changes.
    """
    flat = description.flat()
    found = heads(flat)
    if not found:
        raise InputError("cut: no layer has queries, keys and values of one width.")
    kept = {n: k for h in found for n, k in narrower(flat, h, by).items()}
    reference = copy.deepcopy(model)
    zero(reference, description, kept)
    wanted = outputs(reference, example)
    old = flat.spaces[found[0].values].width // flat.spaces[found[0].values].copies
    todo, best = plan(model, description, kept, example), None
    for factor in (1.0, ((old - by) / old) ** 0.5, (old / (old - by)) ** 0.5):
        small = copy.deepcopy(model)
        _scale_scores(small, flat, found, factor)
        done = cut(small, description, kept, todo, todo.ways()[0])
        if not done.changes:
            _note_heads(small, of_heads(model.config, todo.base, old), old, old - by, flat, kept)
        error = distance(wanted, outputs(small, example))
        best = (small, done, error) if best is None or error < best[2] else best
        if error <= TOLERANCE:
            break
    assert best is not None
    return best


def _note_heads(model: nn.Module, of: OfHeads, old: int, new: int, flat: Flat, kept: Kept) -> None:
    """Modules note the new width of a head, and beside it that of all heads together."""
    for name, attribute in of.attributes:
        module = model.get_submodule(name)
        setattr(module, attribute, new)
        for k, v in list(vars(module).items()):
            if type(v) is int and v > old and v % old == 0 and not k.startswith("_"):
                setattr(module, k, v // old * new)
    for name, dim, length in of.buffers:
        if length * new % old == 0:
            narrow_buffer(model, name, dim, stay(length, length * new // old, flat, kept))


def _scale_scores(model: nn.Module, flat: Flat, found: Sequence[Heads], factor: float) -> None:
    """All scores times a factor: queries or keys, those that come as their space does, take it up."""
    names = {n for h in found for n in (h.plain, h.turned) if n is not None}
    named = stored(model)
    for a in flat.axes.values():
        for label in a.axis.labels:
            for symbol, (at, _) in positions(a, label, names).items():
                if not symbol.powers and factor != 1:
                    with torch.no_grad():
                        index = torch.from_numpy(at)
                        p = named[a.parameter]
                        p.index_copy_(
                            a.axis.dims[-1], index, factor * p.index_select(a.axis.dims[-1], index)
                        )
