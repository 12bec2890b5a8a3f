"""Ops that only move elements: the same op is run on the ids. Fused qkv, heads, transposed layers need no rule of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..arrays import overlapping, uniform, unique_list, varies
from ..ids import Mark
from ..label import Label, Terms
from ..record import Record
from .algebra import changed, freeze, link, plain, scaled, settle
from .call import Call


def mover(call: Call) -> Callable[[Tensor], list[Tensor]]:
    """The op of a call, for an array of ids or constants."""
    if call.op in ("view", "_unsafe_view", "_reshape_alias"):
        return lambda t: [t.reshape(call.args[1])]
    if call.op == "constant_pad_nd":
        return lambda t: [
            torch.ops.aten.constant_pad_nd(t, call.args[1], 0 if t.is_floating_point() else -1)
        ]
    op = getattr(torch.ops.aten, call.op)
    kwargs = {k: v for k, v in call.kwargs.items() if k != "memory_format"}

    def go(t: Tensor) -> list[Tensor]:
        moved = op(t, *call.args[1:], **kwargs)
        return list(moved) if isinstance(moved, (tuple, list)) else [moved]

    return go


def move(r: Record, call: Call) -> None:
    x = call.args[0]
    blank = r.raw(x)
    if blank is not None and blank.blank and call.op != "masked_select":
        moved = mover(call)(blank.fields[0])
        for out, f in zip(call.outs, moved, strict=True):
            r.put(out, Label((f,), blank=True))
        return
    label = r.get(x)
    if label is None:
        return
    if label.parts is not None:
        return move_parts(r, call, label)
    go = mover(call)
    fields = [go(f) for f in label.fields]
    terms = None if label.terms is None else [(go(f), go(c)) for f, c in label.terms]
    stack_of_vectors(r, call, label)
    for k, out in enumerate(call.outs):
        mine = [f[k] for f in fields]
        if out.numel() > 0:
            for f in mine:
                alone(r, f)
        if terms is not None:
            moved = tuple((f[k], c[k]) for f, c in terms)
            if varies(mine[0]):
                r.set(out, mine, terms=moved)
            else:
                r.put(out, None)
                for f, _ in moved:
                    r.ids.freeze(f)
            continue
        kept = flattened(r, [f for f in mine if varies(f)])
        r.set(out, kept, squared=label.squared, parameter=label.parameter)


def alone(r: Record, f: Tensor) -> None:
    """One coordinate was taken out: it stands for itself."""
    if not varies(f) and bool((f >= 0).any()):
        r.ids.fix(f)
        r.ids.mark(f, Mark.NO_MIX)
        r.ids.seen(f)


def stack_of_vectors(r: Record, call: Call, label: Label) -> None:
    """A matrix that is taken row by row is a stack of vectors: the pass is traced again with that known."""
    x = call.args[0]
    whole = id(x) in r.names and x.dim() == len(label.fields) == 2
    if whole and call.op in ("select", "unbind") and label.parameter is not None:
        r.found_stacks.add(label.parameter[0])


def flattened(r: Record, fields: list[Tensor]) -> list[Tensor]:
    """Two spaces on one axis after a reshape: one must be of nodes, and the axis is then runs of the other."""
    while len(fields) > 1 and (hit := overlapping(fields)) is not None:
        nodes = [all(r.ids.marked(a, Mark.NODE) for a in unique_list(fields[k])) for k in hit]
        if not any(nodes):
            for k in hit:
                r.ids.freeze(fields[k])
            joint = fields[hit[1]]
        else:
            coarse, fine = hit if nodes[0] else hit[::-1]
            link(r, fields[coarse], fields[fine])
            joint = scaled(r, fields[fine], fields[coarse])
        fields = [f for k, f in enumerate(fields) if k not in hit] + [joint]
    return fields


def move_parts(r: Record, call: Call, label: Label) -> None:
    """A complex tensor is moved: both of its parts are."""
    go = mover(call)
    real, imaginary = (tuple((go(f)[0], go(c)[0]) for f, c in part) for part in label.parts or ())
    r.put(call.out, Label((go(label.fields[0])[0],), parts=(real, imaginary)))


def keep(r: Record, call: Call) -> None:
    """The same values: copies and casts."""
    label, raw = call.label(r, 0), r.raw(call.args[0])
    if label is None:
        if raw is not None and raw.blank:
            r.put(call.out, raw)
    elif label.parts is not None:
        r.put(call.out, label)
    else:
        r.set(call.out, label.fields, label.terms, label.squared, label.parameter)


def triangle(r: Record, call: Call) -> None:
    """tril, triu: zeros are written over a part."""
    label = settle(r, call.label(r, 0))
    if label is None:
        return
    ones = getattr(torch.ops.aten, call.op)(torch.ones(call.out.shape), *call.args[1:])
    for f in label.fields:
        if not uniform(ones, varies(f)):
            r.ids.freeze(f)
    r.set(call.out, label.fields)


# ---- concatenation


def concatenate(r: Record, call: Call) -> None:
    tensors, d = call.args[0], call.at(1, "dim", 0) % call.out.dim()
    labels = [r.get(t) for t in tensors]
    if call.op == "stack":
        tensors = [t.unsqueeze(d) for t in tensors]
        labels = [None if x is None else changed(x, lambda t: t.unsqueeze(d)) for x in labels]
    kept = [
        (t, x)
        for t, x in zip(tensors, labels, strict=True)
        if t.dim() == call.out.dim() and t.numel()
    ]
    live = [x for _, x in kept if x is not None]
    if not live:
        return
    n = len(live[0].fields)
    if any(len(x.fields) != n or x.parts is not None for x in live):
        return freeze(r, *live)
    if n == 1 and any(x.terms is not None for x in live):
        return concatenate_terms(r, call, kept, d)
    settled = [(t, settle(r, x, keep_gain=True)) for t, x in kept]
    fields = [concatenate_fields(r, settled, k, d, call.out) for k in range(n)]
    if any(f is None for f in fields):
        return freeze(r, *live)
    r.set(call.out, [f for f in fields if f is not None])


def concatenate_terms(
    r: Record, call: Call, kept: list[tuple[Tensor, Label | None]], d: int
) -> None:
    """Constants times coordinates, side by side: shorter sums are filled with zeros."""
    live = [x for _, x in kept if x is not None]
    if len(live) < len(kept):
        return freeze(r, *live)
    most = max(len(x.terms) if x.terms else 1 for x in live)
    rows: list[list[tuple[Tensor, Tensor]]] = []
    for x in live:
        shape = x.fields[0].shape
        own = list(x.terms or ((x.fields[0], torch.ones(shape, dtype=torch.float64)),))
        zero = (x.fields[0], torch.zeros(shape, dtype=torch.float64))
        rows.append(own + [zero] * (most - len(own)))
    terms: Terms = tuple(
        (
            torch.cat([row[k][0] for row in rows], d),
            torch.cat([row[k][1].expand(row[k][0].shape) for row in rows], d),
        )
        for k in range(most)
    )
    r.set(call.out, [torch.cat([x.fields[0] for x in live], d)], terms=terms)


def concatenate_fields(
    r: Record, parts: list[tuple[Tensor, Label | None]], k: int, d: int, out: Tensor
) -> Tensor | None:
    """The k-th field of the whole; None where constants stand among coordinates."""
    live = [x.fields[k] for _, x in parts if x is not None]
    first = live[0].narrow(d, 0, 1)
    along = any(d in varies(f) for f in live)
    if not along and all(f.narrow(d, 0, 1).shape == first.shape for f in live):
        for f in live[1:]:
            r.ids.same(first, f.narrow(d, 0, 1))
        for t, x in parts:
            if x is None and bool((t != 0).any()):
                r.ids.fix(first)
                r.ids.mark(first, Mark.NO_MIX)
                if not uniform(t, varies(first)):
                    r.ids.colour(first, t.narrow(d, 0, 1))
        return first.expand(out.shape)
    if any(x is None and bool((t != 0).any()) for t, x in parts):
        return None
    return torch.cat([torch.full(t.shape, -1) if x is None else x.fields[k] for t, x in parts], d)


# ---- writing into tensors


def write(r: Record, call: Call) -> None:
    """copy_, index_add_, index_put_, scatter_ and their like."""
    x, target = call.args[0], r.raw(call.args[0])
    source = written_source(call)
    label = r.get(source)
    if target is None:
        if call.op == "copy" and label is not None and source.shape == x.shape:
            return r.set(x, label.fields)
        return freeze(r, label)
    if label is None:
        return write_constant(r, call, target, source)
    label = (
        plain(label)
        if call.op == "copy" and target.blank and not label.squared
        else settle(r, label)
    )
    assert label is not None
    if len(target.fields) != 1:
        return freeze(r, call.label(r, 0), label)
    f = target.fields[0]
    if target.blank and call.op != "copy" and write_rows(r, call, f, label):
        return
    into(r, written_places(call, f), label, keep_origin=call.op == "copy")


def written_source(call: Call) -> Any:
    if call.op == "copy":
        return call.args[1]
    if call.op in ("index_put", "_index_put_impl"):
        return call.args[2]
    return call.args[3] if len(call.args) > 3 else None


def written_places(call: Call, f: Tensor) -> Tensor:
    """The ids of the places that are written to."""
    if call.op == "copy":
        return f
    if call.op in ("index_add", "index_copy"):
        return f.index_select(call.args[1], call.args[2])
    if call.op in ("index_put", "_index_put_impl"):
        return torch.ops.aten.index(f, call.args[1])
    return f.gather(call.args[1], call.args[2])


def write_constant(r: Record, call: Call, target: Label, source: Any) -> None:
    if not isinstance(source, Tensor) or not bool((source != 0).any()):
        return
    if not target.blank:
        return freeze(r, call.label(r, 0))
    if source.is_floating_point() and not uniform(source, range(source.dim())):
        r.ids.freeze(target.fields[0])


def write_rows(r: Record, call: Call, f: Tensor, label: Label) -> bool:
    """Which rows are written is data, so the type is the same along them. True where that says all."""
    by_index = call.args[1] if "index_put" in call.op else None
    dims = [call.args[1] % f.dim()] if by_index is None else []
    dims += [k for k, i in enumerate(by_index or ()) if i is not None]
    for d in dims:
        if not any(d in varies(g) for g in label.fields if g.dim() == f.dim()):
            r.ids.same(f.narrow(d, 0, 1), f)
    first = label.fields[0]
    if (
        len(dims) == 1
        and len(label.fields) == 1
        and first.dim() == f.dim()
        and dims[0] not in varies(first)
    ):
        into(r, f.narrow(dims[0], 0, 1), Label((first.narrow(dims[0], 0, 1),)))
        return True
    return False


def placed(r: Record, call: Call) -> None:
    """index_add, scatter, … that make a new tensor: which rows are written is data, what is in a row is not."""
    x, source = call.args[0], call.at(3, "src")
    d = call.args[1] % x.dim()
    target, label = settle(r, r.get(x)), settle(r, r.get(source))
    if label is None and target is None:
        return
    fields = label.fields if label is not None else ()
    if (
        label is None
        or target is not None
        or any(d in varies(f) for f in fields)
        or bool((x != 0).any())
    ):
        return freeze(r, target, label)
    r.set(call.out, [f.narrow(d, 0, 1).expand(call.out.shape) for f in fields])


def into(r: Record, places: Tensor, label: Label, keep_origin: bool = False) -> None:
    """What is written at places, and where it came from."""
    if len(label.fields) != 1:
        return freeze(r, label)
    if keep_origin:
        source = label.terms or ((label.fields[0], torch.ones((), dtype=torch.float64)),)
        columns = [
            tuple(torch.broadcast_to(t, places.shape).reshape(-1).tolist() for t in term)
            for term in source
        ]
        for q, a in enumerate(places.reshape(-1).tolist()):
            r.origin.setdefault(a, [(ids[q], constants[q]) for ids, constants in columns])
    if label.terms is None:
        r.ids.same(places, label.fields[0])


def blank(r: Record, call: Call) -> None:
    """A tensor made empty or of zeros: its elements wait for what is written to them."""
    out = call.out
    if (
        not isinstance(out, Tensor)
        or not out.is_floating_point()
        or not 0 < out.numel() <= 4_000_000
    ):
        return
    if call.op.startswith(("empty", "new_empty")):
        out.zero_()
    if not bool((out != 0).any()):
        r.put(out, Label((r.ids.new(tuple(out.shape)),), blank=True))
