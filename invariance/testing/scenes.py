"""Tiny models, and all that can be measured on them: what the contracts of methods are tried on."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..calibrate import fisher, walk
from ..calibrate.enter import enter
from ..calibrate.moments import Moments, reader_moment
from ..calibrate.statistic import Statistic
from ..core.group import Group
from ..core.space import Space
from ..io.data import Tokens
from ..method.interfaces import Basing
from ..method.joint import Scene
from ..model.canonical import canonicalize
from ..model.layout import Layout
from ..model.verify import logits
from ..model.working import Whole
from .tiny import WORDS, model_of

FAMILIES = ("llama", "opt", "phi", "gemma3_text")
SPLIT = ("edge.0.down", "edge.1.q")
IDS = torch.arange(1, 25)[None] % WORDS


@dataclass
class Ready:
    """A tiny folded model in float64, all that can be measured on it, and its logits of ``IDS``."""

    model: PreTrainedModel
    layout: Layout
    moments: Moments
    logits: Tensor
    tokens: Tokens

    def space(self, kind: str) -> Space:
        """The first space of a kind."""
        return next(s for s in self.layout.spaces.values() if s.kind == kind)


@cache
def ready(family: str, split: tuple[str, ...] = SPLIT) -> Ready:
    model = model_of(family).double()
    layout = canonicalize(model, fold=True, split=split)
    ids = torch.randint(1, WORDS, (8, 24), generator=torch.Generator().manual_seed(1))
    text = Tokens.full(ids)
    parts = Whole(model, layout)
    batches = enter(parts, text.batches(len(ids)), torch.float64)
    also = {"residual": [Statistic.NORMED], "qk": [Statistic.QUERIES]}
    wanted = {
        n: frozenset({Statistic.RAW, Statistic.WEIGHTED, Statistic.MEAN, *also.get(s.kind, [])})
        for n, s in layout.spaces.items()
    }
    each: list[Moments] = []
    walk.oneshot(parts, batches, wanted, torch.float64, leave=lambda _, found: each.append(found))
    moments = Moments(layout=layout)
    for found in each:
        moments = moments.merge(found)
    readers = {(n, Statistic.READERS): reader_moment(parts, s) for n, s in layout.spaces.items()}
    places = dict.fromkeys([*layout.points, *(e.written for e in layout.edges)])
    curved = fisher.measure(parts, places, text, queries=layout.select(["qk"]))
    taylor = {k: m for k, m in curved.known.items() if k[1] is Statistic.TAYLOR}
    fishers = {
        (n, Statistic.FISHER): fisher.moment(parts, s, curved)
        for n, s in layout.spaces.items()
        if layout.written_behind(n)
    }
    moments = moments.merge(Moments({**taylor, **readers, **fishers}))
    return Ready(model, layout, moments, logits(model, IDS), text)


def scene(
    kinds: Collection[str] = ("residual", "mlp", "vo"), family: str = "llama", keep: float = 0.75
) -> Scene:
    """What a joint method sees of a tiny model: spaces of some kinds, each to keep a fraction of its directions.

    Points of the stream share what they get.
    """
    at = ready(family, ())
    model = model_of(family)
    layout = canonicalize(model, fold=True)
    names = layout.select([k for k in kinds if k != "residual"])
    members: dict[str, tuple[str, ...]] = {n: (n,) for n in names}
    if "residual" in kinds:
        members = {layout.points[0]: tuple(layout.points), **members}
    spaces = {n: layout.spaces[n] for n in members}
    moments = at.moments
    if "residual" in kinds:
        moments = moments.pooled(layout.points, layout.points[0])
        inner = {k: m for k, m in at.moments.known.items() if k[0] in names}
        moments = Moments({**inner, **moments.known}, layout)
    widths = {n: _kept(space, keep) for n, space in spaces.items()}
    return Scene(model.requires_grad_(False), layout, spaces, members, widths, at.tokens, moments)


def _kept(space: Space, keep: float) -> int:
    return max(
        (k for k in range(1, space.dim + 1) if space.fits(k) and k <= keep * space.dim),
        default=space.dim,
    )


def serves(method: Basing, space: Space) -> bool:
    """Whether a plan would give the space to this method."""
    fits = method.width_limit is None or method.width_limit(space.dim) is None
    normed = Statistic.NORMED in method.needs and space.kind != "residual"
    unmeasured = Statistic.FISHER in method.needs and space.kind == "qk"
    queries = {Statistic.QUERIES, Statistic.TAYLOR} & method.needs and space.kind != "qk"
    paired = method.produces is not Group.ROTARY or space.rotary > 0
    admitted = space.admits(method.produces) and space.kind in method.kinds
    return admitted and fits and paired and not (normed or unmeasured or queries)
