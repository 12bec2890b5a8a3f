"""Queries and keys that constants turned (rotary positions): what commutes with all the turns.

Each side is y = J_t x, with J_t a matrix of constants for token t. A plane that both sides turn by angles, J = a + b·i,
keeps complex scales; a coordinate that every token leaves alone keeps GL among its like; any other pattern keeps one scale.
"""

from __future__ import annotations

from typing import Any

import torch
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from ..arrays import uniform, varies
from ..ids import Mark
from ..label import Label
from ..record import Record
from .algebra import release

Turns = list[
    tuple[list[int], Tensor]
]  # per batch of heads: its ids, and T × K × K matrices of constants


def rotary(r: Record, lx: Label, ly: Label) -> tuple[Tensor, Tensor] | None:
    """The fields of queries and keys before they were turned; None where the pattern is not understood."""
    queries, keys = turns_of(lx, 2), turns_of(ly, 1)
    if queries is None or keys is None or len(queries) != len(keys):
        return None
    if not all(alike(a, b) for (_, a), (_, b) in zip(queries, keys, strict=True)):
        return None
    met = [
        p for (bx, _), (by, _) in zip(queries, keys, strict=True) for p in zip(bx, by, strict=True)
    ]
    r.ids.met(dict.fromkeys(met))
    for (bx, turn), (by, _) in zip(queries, keys, strict=True):
        for group in planes(turn):
            commute(r, turn[:, group][:, :, group], [bx[i] for i in group], [by[i] for i in group])
        for a, b in zip(bx, by, strict=True):
            r.ids.relate(a, b, -1)
        for side in (bx, by):
            ids = torch.tensor(side)
            release(r, ids)
            r.ids.seen(ids)
            r.ids.mark(ids, Mark.ACTIVATION)
    n, k = len(queries), len(queries[0][0])
    x = torch.stack([torch.tensor(b) for b, _ in queries])[:, None, :]
    y = torch.stack([torch.tensor(b) for b, _ in keys])[:, :, None]
    return x.expand(n, lx.fields[0].shape[1], k), y.expand(n, k, ly.fields[0].shape[2])


def turns_of(label: Label, dim: int) -> Turns | None:
    """The terms of one side as matrices of constants; None where ids change along the tokens."""
    terms = [(f.movedim(dim, -1), c.movedim(dim, -1)) for f, c in label.terms or ()]
    heads, tokens, width = terms[0][0].shape
    out: Turns = []
    for b in range(heads):
        if any(1 in varies(f[b : b + 1]) for f, _ in terms):
            return None
        base: list[int] = []
        for f, _ in terms:
            base += f[b, 0].tolist()
        base = list(dict.fromkeys(base))
        if len(base) != width:
            return None
        at = {a: j for j, a in enumerate(base)}
        turn = torch.zeros(tokens, width, width, dtype=torch.float64)
        for f, c in terms:
            columns = torch.tensor([at[a] for a in f[b, 0].tolist()])
            turn[:, torch.arange(width), columns] += c[b].double()
        out.append((base, turn))
    return out


def alike(one: Tensor, two: Tensor) -> bool:
    """Whether the turns of both sides are equal up to one factor."""
    if one.shape != two.shape:
        return False
    scale = float(one.abs().sum() * two.abs().max())
    return torch.allclose(one * two.abs().sum(), two * one.abs().sum(), atol=1e-9 * scale)


def planes(turn: Tensor) -> list[list[int]]:
    """Groups of coordinates that the turns mix."""
    linked = (turn.abs() > 1e-12).any(0)
    labels = connected_components(csr_matrix((linked | linked.T).numpy()), directed=False)[
        1
    ].tolist()
    groups: dict[int, list[int]] = {}
    for i, c in enumerate(labels):
        groups.setdefault(c, []).append(i)
    return list(groups.values())


def commute(r: Record, turn: Tensor, query: list[int], key: list[int]) -> None:
    """Marks and colours the coordinates of one group of both sides."""
    kind: tuple[Any, ...]
    if len(query) == 1 and uniform(turn, (0,)):
        kind = ("spared", round(float(turn[0, 0, 0]), 9))
    elif is_rotation(turn):
        kind = ("pair", round(float(turn[:, 0, 0].sum()), 9), round(float(turn[:, 0, 1].sum()), 9))
        for two in (query, key):
            r.turned[(two[0], two[1])] = None
            r.ids.same_scale(torch.tensor(two[:1]), torch.tensor(two[1:]))
            r.ids.seen(torch.tensor(two))
    else:
        kind = ("odd", *[round(float(v), 9) for v in turn.sum(0).flatten()])
        for ids in (query, key):
            r.ids.mark(torch.tensor(ids), Mark.NO_MIX)
            r.ids.same_scale(torch.tensor(ids[:1]), torch.tensor(ids))
    for ids in (query, key):
        for k, a in enumerate(ids):
            r.ids.paint(a, ("turned", *kind, k))


def is_rotation(turn: Tensor) -> bool:
    """Whether every token's 2 × 2 matrix is [[a, b], [-b, a]]."""
    return (
        turn.shape[1] == 2
        and torch.allclose(turn[:, 0, 0], turn[:, 1, 1])
        and torch.allclose(turn[:, 0, 1], -turn[:, 1, 0])
    )
