"""What rules share: labels settled, products of coordinates, nodes above fibres, what an op sees at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..arrays import (
    core,
    cores,
    overlapping,
    uniform,
    unique_list,
    unique_pairs,
    unique_rows,
    varies,
)
from ..ids import Mark
from ..label import Label, Terms
from ..record import Record

# ---- labels


def changed(label: Label, go: Callable[[Tensor], Tensor]) -> Label:
    """The label with ``go`` done to its arrays: for views."""
    terms = None if label.terms is None else tuple((go(f), go(c)) for f, c in label.terms)
    return replace(label, fields=tuple(map(go, label.fields)), terms=terms)


def expand(label: Label | None, shape: Sequence[int]) -> Label | None:
    return None if label is None else changed(label, lambda t: t.expand(shape))


def value(v: Any, out: Tensor) -> Tensor:
    """A constant as an array of the output's shape."""
    v = v if isinstance(v, Tensor) else torch.tensor(float(v), dtype=torch.float64)
    return v.expand(out.shape)


def as_terms(label: Label, shape: Sequence[int]) -> Terms:
    return label.terms or ((label.fields[0], torch.ones(tuple(shape), dtype=torch.float64)),)


def plain(label: Label | None) -> Label | None:
    """The label without constants that are equal all over each space."""
    if label is not None and label.terms is not None and len(label.terms) == 1:
        f, c = label.terms[0]
        if uniform(c, varies(f)):
            return Label((f,))
    return label


def release(r: Record, field: Tensor) -> None:
    """Gains that wait here cannot be folded: something else than a linear reader sees them."""
    for a in unique_list(field):
        if a in r.gains:
            r.broken.add(r.gains[a].name)


def settle(r: Record, label: Label | None, keep_gain: bool = False) -> Label | None:
    """A label of plain coordinates: constants and squares no longer wait for what they might become."""
    if label is None:
        return None
    if not keep_gain:
        for f in label.fields:
            release(r, f)
    if label.squared:
        return Label(tuple(product(r, [(f, 1), (f, 1)]) for f in label.fields))
    if label.terms is None:
        return label
    return Label((settle_terms(r, label.fields[0], label.terms),))


def settle_terms(r: Record, first: Tensor, terms: Terms) -> Tensor:
    """A sum of constants times coordinates: each keeps its place, and all in a sum have one scale."""
    if len(terms) == 1:
        f, c = terms[0]
        if not uniform(c, varies(f)):
            r.ids.colour(f, c)
        return f
    for f, c in terms:
        live = c != 0
        r.ids.same_scale(first.expand(c.shape)[live], f.expand(c.shape)[live])
        r.ids.mark(f, Mark.NO_MIX)
        r.ids.colour(f, c)
    r.ids.colour(first, torch.stack([c.expand(first.shape) for _, c in terms]).sum(0))
    return first


# ---- products


def product(r: Record, factors: Iterable[tuple[Tensor, int]]) -> Tensor:
    """Coordinates whose scale is a product: factors are (field, exponent), of one shape."""
    factors, ids = list(factors), r.ids
    live = [(f, e) for f, e in factors if not all(map(ids.fixed, unique_list(f)))]
    for f, _ in factors:
        ids.mark(f, Mark.NO_MIX)
    shape = factors[0][0].shape
    small = list(zip(cores(*[f for f, _ in factors]), [e for _, e in factors], strict=True))
    for f, _ in small[1:]:
        pairs = ids.pairs(factors[0][0], f)
        ids.met([(a, b) for a, b in pairs if a != b])
        for a, b in pairs:
            ids.merge(a, b)
    if len(live) == 1 and live[0][1] == 1:
        return live[0][0]
    if not live:
        return small[0][0].expand(shape)
    rows, inverse = unique_rows(torch.stack([f.reshape(-1) for f, _ in small], 1))
    powers = tuple(e for _, e in small)
    new, fresh = r.coin(("product", powers, *row) for row in rows.tolist())
    for k in range(rows.shape[1]):
        ids.met(zip(new.tolist(), rows[:, k].tolist(), strict=True))
    for row, c, unknown in zip(rows.tolist(), new.tolist(), fresh, strict=True):
        if unknown and min(row) >= 0:
            ids.merge(c, row[0])
            ids.equate([*zip(row, powers, strict=True), (c, -1)])
    return new[inverse].reshape(small[0][0].shape).expand(shape)


def scaled(r: Record, fine: Tensor, coarse: Tensor, exponents: tuple[int, int] = (1, 1)) -> Tensor:
    """Coordinates times one number per group of them (a head's gate): they still mix within the group."""
    ids, (ef, ec) = r.ids, exponents
    pairs, inverse, shape = unique_pairs(fine, coarse)
    new, fresh = r.coin(("scaled", ef, ec, a, b) for a, b in pairs.tolist())
    for k in (0, 1):
        ids.met(zip(new.tolist(), pairs[:, k].tolist(), strict=True))
    for (a, b), c, unknown in zip(pairs.tolist(), new.tolist(), fresh, strict=True):
        if a < 0 or b < 0 or not unknown:
            continue
        ids.merge(c, a)
        if ef != 1:
            ids.marks[c] |= Mark.NO_MIX
        if ids.scale(b)[0] in ids.units and ef in (1, -1):
            ids.relate(c, a, ef)
            continue
        ids.marks[a] |= Mark.NO_MIX
        ids.equate([(a, ef), (b, ec), (c, -1)])
    return new[inverse].reshape(shape).expand(fine.shape)


def combine(
    r: Record, fields: Iterable[Tensor], exponents: Iterable[int] | None = None
) -> list[Tensor]:
    """Fields of one product: where two change along one axis, one coordinate, or a node above coordinates."""
    fields = list(fields)
    powers = [1] * len(fields) if exponents is None else list(exponents)
    while (hit := overlapping(fields)) is not None:
        i, j = hit
        one, two = set(varies(fields[i])), set(varies(fields[j]))
        if one == two:
            joint = product(r, [(fields[i], powers[i]), (fields[j], powers[j])])
        else:
            fine, coarse = (i, j) if two <= one else (j, i)
            if not set(varies(fields[coarse])) <= set(varies(fields[fine])):
                r.ids.freeze(fields[i])
                r.ids.freeze(fields[j])
                joint = fields[i]
            else:
                link(r, fields[coarse], fields[fine])
                r.ids.mark(fields[coarse], Mark.NO_MIX)
                joint = scaled(r, fields[fine], fields[coarse], (powers[fine], powers[coarse]))
        fields = [f for k, f in enumerate(fields) if k not in hit] + [joint]
        powers = [e for k, e in enumerate(powers) if k not in hit] + [1]
    return fields


# ---- nodes and sets


def link(r: Record, coarse: Tensor, fine: Tensor) -> None:
    """Each coarse coordinate is a node above the fine ones that stand at its places."""
    c, f = (t.reshape(-1) for t in cores(coarse, fine))
    order = torch.argsort(c, stable=True)
    nodes, counts = torch.unique_consecutive(c[order], return_counts=True)
    for node, below in zip(nodes.tolist(), torch.split(f[order], counts.tolist()), strict=True):
        if node >= 0:
            ids = list(dict.fromkeys(a for a in below.tolist() if a >= 0))
            r.ids.link(node, ids)
            r.ids.seen(torch.tensor(ids))


def fibres(r: Record, field: Tensor, dims: Sequence[int]) -> None:
    """What an op sees at once: the ids along ``dims``, for every position beside them."""
    if not varies(field, dims):
        return r.ids.seen(field)
    c = core(field)
    rest = [d for d in range(c.dim()) if d not in dims]
    rows = c.permute(*rest, *dims).reshape(-1, math.prod(c.shape[d] for d in dims))
    for row in unique_rows(rows)[0]:
        r.ids.seen(row)


def leftover(r: Record, field: Tensor, dims: Sequence[int]) -> Tensor:
    """The node above each fibre along ``dims``; those axes are kept with length 1."""
    c = core(field)
    rest = [d for d in range(c.dim()) if d not in dims]
    rows = c.permute(*rest, *dims)
    lead = rows.shape[: len(rest)]
    different, inverse = unique_rows(rows.reshape(math.prod(lead), -1))
    nodes = torch.tensor([r.ids.node(row) for row in different.tolist()])[inverse].reshape(lead)
    for d in sorted(dims):
        nodes = nodes.unsqueeze(d)
    return nodes.expand([1 if d in dims else n for d, n in enumerate(field.shape)])


def functional(r: Record, field: Tensor, dims: Sequence[int], values: Tensor | None = None) -> None:
    """A constant vector is paired with a space: a sum, a mean, a constant that is added."""
    release(r, field)
    r.ids.fix(field)
    if values is None or uniform(values, varies(field, dims)):
        r.ids.mark(field, Mark.ONES)
    else:
        r.ids.mark(field, Mark.NO_MIX)
        r.ids.colour(field, values)


def freeze(r: Record, *labels: Label | None) -> None:
    """Rigid: what these labels hold is never changed."""
    for label in labels:
        settled = settle(r, label)
        for f in settled.fields if settled is not None else ():
            r.ids.freeze(f)
