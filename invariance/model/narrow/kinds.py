"""Which spaces of a derived layout can be cut, by kind: the stream, channels, experts, heads, values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
from torch import nn

from ..described.description import Flat, Kind, Space
from ..described.elements import blocks
from ..described.pattern import expand
from .experts import chosen, is_experts
from .positions import Kept

STREAM = "residual"


def stream(flat: Flat) -> Space | None:
    """The one global space of the stream."""
    found = flat.spaces.get(STREAM)
    return None if found is None or found.local else found


def channels(flat: Flat) -> dict[str, str]:
    """Spaces of channels behind which a matrix writes the stream, and that matrix's name in its layer."""
    pointed = any(a.axis.points for a in flat.axes.values())
    made = dict[str, str]()
    for name, space in flat.spaces.items():
        part = _behind(flat, name, space, pointed)
        if part is not None:
            made[name] = part
    return made


def _behind(flat: Flat, name: str, space: Space, pointed: bool) -> str | None:
    """The matrix behind channels; None where the space is no such channels, or of heads. Where nothing is said of the
    stream, the last dim of a matrix stands for what it reads."""
    if space.kind is not Kind.PERM or "@" not in name:
        return None
    part = None
    for a in flat.carrying(name):
        first = {s.space for s, _ in expand(a.axis.labels[0])}
        if space.copies > 1 and len(first) > 1:
            return None  # of heads, beside queries and keys
        if any(s.space.startswith("heads") for label in a.axis.labels for s, _ in expand(label)):
            return None
        others = [o for o in flat.of[a.parameter] if o.axis.dims != a.axis.dims]
        writes = any(p.writes for o in others for p in o.axis.points)
        reads = (
            not pointed and bool(others) and a.axis.dims[-1] > max(o.axis.dims[-1] for o in others)
        )
        if part is None and (writes or reads):
            part = a.axis.parameter.removesuffix(".weight")
    return part


def experts(flat: Flat, taken: Mapping[int, int]) -> dict[str, int]:
    """Spaces of whole experts, and how many a token takes. ``taken``: how many, by how many there are."""
    return {
        n: taken[s.width] for n, s in flat.spaces.items() if is_experts(n, s) and s.width in taken
    }


def heads(flat: Flat) -> dict[str, list[list[int]]]:
    """Spaces of whole heads, and what of them goes together: query heads with the keys and values that they share."""
    made = dict[str, list[list[int]]]()
    for name, space in flat.spaces.items():
        if space.kind is Kind.SWAP and name.startswith("heads"):
            found = _together(space)
            if len(found) > 1:
                made[name] = found
    return made


def _together(space: Space) -> list[list[int]]:
    """Groups of heads that a move takes to each other as wholes; single heads where each changes places alone."""
    alone = [m[0] for m in space.moves if len(m) == 1]
    whole = [m for m in space.moves if len(m) > 1]
    if not whole:
        return [[c] for c in range(space.width)]
    group = list(range(space.width))
    for a, b in alone:  # heads that share what other moves take along
        group = [group[a] if g == group[b] else g for g in group]
    for move in whole:
        for side in zip(*move, strict=True):
            first = group[side[0]]
            joined = {group[c] for c in side}
            group = [first if g in joined else g for g in group]
    return [[c for c in range(space.width) if group[c] == g] for g in sorted(set(group))]


def values(flat: Flat) -> list[str]:
    """Spaces of values that any matrix may turn."""
    return [
        n for n, s in flat.spaces.items() if s.kind is Kind.GL and n.startswith("vo") and "@" in n
    ]


def sample(space: Space, last: bool = False) -> np.ndarray:
    """About three quarters of each block: all but the first ones, or all but the last."""
    each = blocks(space)
    n = each.shape[1]
    k = 3 * n // 4
    k = k // 8 * 8 or k // 2 * 2 or k
    some = each[:, :k] if last else each[:, n - k :]
    return np.sort(some.reshape(-1))


Samples = Callable[[bool], Kept]


def samples(flat: Flat, model: nn.Module) -> dict[str, Samples]:
    """Of each kind that there is, a cut to try, and one of others as many. ``model``: on meta, to see what experts take."""
    made = dict[str, Samples]()

    def of(names: Iterable[str]) -> Samples:
        found = [n for n in names if len(blocks(flat.spaces[n])[0]) > 1]
        return lambda last: {n: sample(flat.spaces[n], last) for n in found}

    made["mlp"] = of(channels(flat))
    if stream(flat) is not None:
        made["stream"] = of([STREAM])
    made["vo"] = of(values(flat))
    groups = heads(flat)
    made["heads"] = lambda last: {
        n: np.sort(np.concatenate(g[:-1] if last else g[1:])) for n, g in groups.items()
    }
    routed = experts(flat, chosen(model))
    fewer = {n for n, k in routed.items() if k < flat.spaces[n].width}
    made["experts"] = lambda last: {
        n: np.arange(flat.spaces[n].width)[slice(0, -1) if last else slice(1, None)] for n in fewer
    }
    return {kind: f for kind, f in made.items() if f(False)}
