"""Sums and products of two tensors: residual streams, biases, gates and gains."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..arrays import core, uniform, unique, unique_list, unique_pairs, varies
from ..ids import Mark
from ..label import Label
from ..record import Fold, Gain, Record
from .algebra import as_terms, combine, expand, freeze, link, plain, release, settle, value
from .call import Call
from .complex import multiply_complex
from .movement import into
from .pointwise import nonlinear

# ---- sums


def add(r: Record, call: Call) -> None:
    """add, sub, rsub: the same coordinate on both sides; what is constant must not vary over a space that mixes."""
    x, y = call.args[0], call.args[1]
    target = r.raw(x)
    if call.before is not None and target is not None and target.blank:
        label = settle(r, call.label(r, 1))
        if label is not None:
            into(r, target.fields[0], label)
        return
    add_labels(r, (x, call.label(r, 0)), (y, call.label(r, 1)), call.out, minus=call.op == "sub")


Operand = tuple[Any, Label | None]


def add_labels(r: Record, one: Operand, two: Operand, out: Tensor, minus: bool = False) -> None:
    shape = out.shape
    (x, lx), (y, ly) = ((v, plain(expand(label, shape))) for v, label in (one, two))
    if lx is None:
        x, y, lx, ly = y, x, ly, lx
    if lx is None:
        return
    if ly is None:
        return add_constant(r, lx, value(y, out), out)
    if lx.parts is not None or ly.parts is not None:
        return freeze(r, lx, ly)
    if (lx.terms or ly.terms) and len(lx.fields) == len(ly.fields) == 1:
        fields = [f for label in (lx, ly) for f, _ in as_terms(label, shape)]
        if len(set(map(varies, fields))) == 1:
            return add_terms(r, lx, ly, out, minus)
    keep = lx.parameter is not None or ly.parameter is not None
    sx, sy = settle(r, lx, keep), settle(r, ly, keep)
    assert sx is not None and sy is not None
    if sx.parameter is not None and sy.parameter is None:
        x, y, sx, sy = y, x, sy, sx
    r.set(out, add_fields(r, sx, sy, value(x, out), value(y, out)))


def add_constant(r: Record, label: Label, v: Tensor, out: Tensor) -> None:
    if not bool((v != 0).any()):
        return r.set(out, label.fields, label.terms, label.squared)
    if label.parameter is not None and v.numel() and uniform(v, range(v.dim())):
        for f in label.fields:
            r.ids.fix(f)
        name, offset = label.parameter
        return r.set(out, label.fields, parameter=(name, offset + float(v.flatten()[0])))
    settled = settle(r, label)
    assert settled is not None
    for f in settled.fields:
        r.ids.fix(f)
        r.ids.seen(f)
        if uniform(v, varies(f)):
            r.ids.mark(f, Mark.ONES)
        else:
            r.ids.mark(f, Mark.NO_MIX)
            r.ids.colour(f, v)
    r.set(out, settled.fields)


def add_terms(r: Record, lx: Label, ly: Label, out: Tensor, minus: bool) -> None:
    """Rotary positions: x cos + rotate(x) sin, kept as a sum of constants times coordinates."""
    sign = -1 if minus else 1
    merged: list[tuple[Tensor, Tensor]] = []
    for f, c in [*as_terms(lx, out.shape), *((f, sign * c) for f, c in as_terms(ly, out.shape))]:
        at = next((k for k, (g, _) in enumerate(merged) if torch.equal(f, g)), None)
        if at is None:
            merged.append((f, c))
        else:
            merged[at] = (f, merged[at][1] + c)
    r.set(out, [merged[0][0]], terms=tuple(merged))


def add_fields(r: Record, lx: Label, ly: Label, x: Tensor, y: Tensor) -> list[Tensor]:
    """Fields that change along the same axes are one; a field that only one side has must see a constant."""
    ids, fields, used = r.ids, [], set()
    for f in lx.fields:
        ids.seen(f)
        hits = [k for k, g in enumerate(ly.fields) if set(varies(g)) & set(varies(f))]
        if not hits:
            lonely(r, f, y)
        if hits:
            told_apart(r, f, ly, y)
        for k in hits:
            used.add(k)
            told_apart(r, ly.fields[k], lx, x)
            f = add_pair(r, f, ly.fields[k], ly.parameter)
        fields.append(f)
    for k, g in enumerate(ly.fields):
        if k not in used:
            release(r, g)
            ids.fix(g)
            if uniform(x, varies(g)):
                ids.mark(g, Mark.ONES)
                fields.append(g)
            else:
                ids.freeze(g)
    return fields


def lonely(r: Record, f: Tensor, other: Tensor) -> None:
    """A space of one summand only: the other one is a constant to it."""
    if bool((other != 0).any()):
        release(r, f)
        r.ids.fix(f)
        if uniform(other, varies(f)):
            r.ids.mark(f, Mark.ONES)
        else:
            r.ids.freeze(f)


def add_pair(r: Record, f: Tensor, g: Tensor, parameter: tuple[str, float] | None) -> Tensor:
    """Two fields on common axes; a bias beside a gain that waits is divided by the gain when that is folded."""
    ids = r.ids
    ids.seen(g)
    vf, vg = set(varies(f)), set(varies(g))
    if vf == vg:
        waits = any(a in r.gains for a in unique_list(f))
        if waits and parameter is not None and parameter[1] == 0:
            for a, b in ids.pairs(f, g):
                gain = r.gains.get(a)
                r.use(b, None if gain is None else Fold(gain.name, gain.index, -1))
        else:
            if waits:
                release(r, f)
            release(r, g)
        ids.same(f, g)
        return f
    if not (vg < vf or vf < vg):
        ids.freeze(f)
        ids.freeze(g)
        return f
    coarse, fine = (g, f) if vg < vf else (f, g)
    link(r, coarse, fine)
    ids.fix(f)
    ids.fix(g)
    ids.mark(fine, Mark.ONES)
    ids.mark(coarse, Mark.NO_MIX)
    return fine


# ---- products


def multiply(r: Record, call: Call) -> None:
    """mul, div: scales multiply and nothing mixes; times a weight, a gain that may be folded."""
    if call.before is not None and (target := r.raw(call.args[0])) is not None and target.blank:
        return
    x, y = call.args[0], call.args[1]
    lx, ly = call.label(r, 0), call.label(r, 1)
    if call.op == "mul" and multiply_complex(r, (x, lx), (y, ly), call.out):
        return
    multiply_labels(r, (x, lx), (y, ly), call.out, 1 if call.op == "mul" else -1)


def multiply_labels(r: Record, one: Operand, two: Operand, out: Tensor, power: int = 1) -> None:
    """x × y to the power of 1 or -1."""
    (x, lx), (y, ly) = one, two
    if x is y and lx is not None and power == 1:
        settled = settle(r, lx)
        return r.set(out, settled.fields if settled else (), squared=True)
    lx, ly = plain(expand(lx, out.shape)), plain(expand(ly, out.shape))
    if lx is None and ly is None:
        return
    if lx is None and power == -1:
        assert ly is not None
        nonlinear(r, ly, out=out)
        return
    if lx is None:
        x, y, lx, ly = y, x, ly, lx
    assert lx is not None
    if lx.parts is not None or (ly is not None and ly.parts is not None):
        return freeze(r, lx, ly)
    if ly is None:
        return multiply_constant(r, lx, y, out, power)
    if not bool((x != 0).any()) or not bool((y != 0).any()):
        return
    if lx.parameter is not None and ly.parameter is None and power == 1:
        x, y, lx, ly = y, x, ly, lx
    if power == 1 and (fields := gain_fields(r, lx, ly)) is not None:
        return r.set(out, fields)
    sx, sy = settle(r, lx), settle(r, ly)
    assert sx is not None and sy is not None
    factors: list[tuple[Tensor, int]] = []
    for f in (*sx.fields, *sy.fields):
        r.ids.seen(f)
    for own, other, v, e in ((sx, sy, y, 1), (sy, sx, x, power)):
        for f in own.fields:
            told_apart(r, f, other, value(v, out))
            factors.append((f, e))
    r.set(out, combine(r, [f for f, _ in factors], [e for _, e in factors]))


def told_apart(r: Record, f: Tensor, other: Label, values: Tensor) -> None:
    """Coordinates that meet the same coordinates of the other operand, but other values, meet constants: nothing mixes.

    So it is where the other operand was computed, in part, by something that has no coordinates.
    """
    along = varies(f)
    rest = [d for d in range(f.dim()) if d not in along]
    places = math.prod(f.shape[d] for d in along)
    group = torch.zeros(places, dtype=torch.int64)
    for g in other.fields:
        ids = g.permute(*along, *rest).reshape(places, -1)[:, 0] if places else group
        group = torch.unique(torch.stack((group, ids), 1), dim=0, return_inverse=True)[1]
    if int(group.max()) + 1 == places and len(other.fields) > 0:
        return
    rows = core(values).permute(*along, *rest)
    rows = rows.expand(*[f.shape[d] for d in along], *rows.shape[len(along) :]).reshape(places, -1)
    first = torch.full((int(group.max()) + 1,), places).scatter_reduce(
        0, group, torch.arange(places), "amin"
    )
    if not torch.equal(rows, rows[first[group]]):
        r.ids.mark(f, Mark.NO_MIX)
        r.ids.colour(f, values)


def multiply_constant(r: Record, label: Label, y: Any, out: Tensor, power: int) -> None:
    if isinstance(y, Tensor) and y.is_complex():
        return freeze(r, label)
    v = value(y, out).double()
    if power == -1:
        v = 1 / v
    if not bool((v != 0).any()):
        return
    flat = all(uniform(v, varies(f)) for f in label.fields)
    if label.squared:
        return r.set(out, label.fields, squared=True) if flat else freeze(r, label)
    if flat and label.terms is None:
        return r.set(out, label.fields)
    if len(label.fields) == 1:
        terms = tuple((f, c * v) for f, c in as_terms(label, out.shape))
        return r.set(out, label.fields, terms=terms)
    settled = settle(r, label)
    assert settled is not None
    for f in settled.fields:
        if not uniform(v, varies(f)):
            r.ids.colour(f, v)
            r.ids.seen(f)
    r.set(out, settled.fields)


# ---- gains


def gain_fields(r: Record, lx: Label, ly: Label) -> list[Tensor] | None:
    """The product's fields where ``ly`` is a vector of weights that may be a gain, else None."""
    if (
        ly.parameter is None
        or lx.parameter is not None
        or len(ly.fields) != 1
        or lx.squared
        or lx.terms
    ):
        return None
    g = ly.fields[0]
    f = next((f for f in lx.fields if varies(f)[-1:] == varies(g)), None)
    if f is None or any(a in r.gains for a in unique_list(f)):
        return None
    r.ids.seen(f)
    r.ids.seen(g)
    return [h for h in lx.fields if h is not f] + [gained(r, f, g, ly.parameter)]


def gained(r: Record, f: Tensor, g: Tensor, parameter: tuple[str, float]) -> Tensor:
    """gain × coordinate: a new id of the same class, whose gain may yet be folded into linear readers."""
    ids, (name, offset) = r.ids, parameter
    pairs, inverse, shape = unique_pairs(f, g)
    new, fresh = r.coin(("gained", a, b) for a, b in pairs.tolist())
    first = int(unique(r.weights[name].fields[0]).min())
    for k in (0, 1):
        ids.met(zip(new.tolist(), pairs[:, k].tolist(), strict=True))
    for (a, b), c, unknown in zip(pairs.tolist(), new.tolist(), fresh, strict=True):
        if a < 0 or b < 0 or not unknown:
            continue
        ids.merge(c, a)
        ids.merge(c, b)
        if ids.scale(b)[0] in ids.units:
            ids.relate(c, a, 1)
        elif ids.scale(a)[0] in ids.units:
            ids.relate(c, b, 1)
        else:
            ids.equate([(a, 1), (b, 1), (c, -1)])
        r.gains[c] = Gain(name, b - first, offset)
        ids.marks[b] |= Mark.GAIN
    return new[inverse].reshape(shape).expand(f.shape)


def lerp(r: Record, call: Call) -> None:
    """x + w (y - x): a sum of both, times what the weight says."""
    weight = call.args[2]
    labels = [settle(r, call.label(r, i)) for i in range(3)]
    if labels[2] is not None or (
        isinstance(weight, Tensor) and not uniform(weight, range(weight.dim()))
    ):
        return freeze(r, *labels)
    add_labels(r, (call.args[0], labels[0]), (call.args[1], labels[1]), call.out)
