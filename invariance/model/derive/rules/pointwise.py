"""Elementwise functions: nothing mixes; ReLU passes positive scales, odd functions pass signs, others nothing."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..arrays import uniform, unique_list, varies
from ..ids import Mark
from ..label import Label
from ..record import Record
from .algebra import as_terms, expand, fibres, freeze, settle, value
from .call import Call

_ODD = {"tanh", "sin", "erf", "sign", "asinh"}
_POSITIVE = {"relu", "leaky_relu"}


def nonlinear(r: Record, label: Label, op: str = "", out: Any = None) -> Label:
    """Marks what a label holds; the label of the result."""
    settled = settle(r, label)
    assert settled is not None
    for f in settled.fields:
        r.ids.mark(f, Mark.NO_MIX)
        r.ids.seen(f)
        if op in _POSITIVE:
            r.ids.fix(f, "sign")
        else:
            r.ids.fix(f, "log" if op in _ODD else "both")
    if out is not None:
        r.set(out, settled.fields)
    return settled


def pointwise(r: Record, call: Call) -> None:
    """A function of each element; of several labelled tensors nothing is known."""
    labels = [x for t in call.tensors if (x := r.get(t)) is not None]
    if call.before is not None and call.before[0] is not None:
        labels[:1] = [call.before[0]]
    if len(labels) > 1 or any(x.parts is not None for x in labels):
        return freeze(r, *labels)
    if labels:
        others_are_constant(r, call, labels[0])
        nonlinear(r, labels[0], call.op, call.outs[0])


def others_are_constant(r: Record, call: Call, label: Label) -> None:
    """Constants beside the one labelled tensor tell coordinates apart where they vary over them."""
    for t in call.tensors:
        if r.get(t) is None and t.is_floating_point() and t.numel() > 1:
            v = value(t, call.outs[0])
            for f in label.fields:
                if tuple(f.shape) == tuple(v.shape) and not uniform(v, varies(f)):
                    r.ids.colour(f, v)


def softmax(r: Record, call: Call) -> None:
    label = call.label(r, 0)
    if label is None:
        return
    nonlinear(r, label, call.op, call.out)
    done = r.get(call.out)
    for f in done.fields if done is not None else ():
        fibres(r, f, (call.args[1] % call.args[0].dim(),))


def square(r: Record, call: Call) -> None:
    label = settle(r, call.label(r, 0))
    if label is not None:
        r.set(call.out, label.fields, squared=True)


def power(r: Record, call: Call) -> None:
    if (
        call.label(r, 0) is not None
        and isinstance(call.args[1], (int, float))
        and call.args[1] == 2
    ):
        square(r, call)
    else:
        pointwise(r, call)


def negate(r: Record, call: Call) -> None:
    label = call.label(r, 0)
    if label is None:
        return
    if label.parts is not None:
        return freeze(r, label)
    if len(label.fields) != 1 or label.squared:
        settled = settle(r, label)
        return r.set(call.out, settled.fields if settled else ())
    terms = tuple((f, -c) for f, c in as_terms(label, call.args[0].shape))
    r.set(call.out, label.fields, terms=terms)


def absolute(r: Record, call: Call) -> None:
    """|x|: signs are lost, positive scales stay."""
    label = call.label(r, 0)
    if label is None:
        return
    if label.parts is not None or label.squared:
        return freeze(r, label)
    nonlinear(r, label, "relu", call.out)


def where(r: Record, call: Call) -> None:
    """masked_fill, where: two tensors side by side, chosen by a mask."""
    if call.op == "masked_fill":
        x, mask, y = call.args[:3]
        lx, ly = call.label(r, 0), call.label(r, 2)
    else:
        mask, x, y = call.args[:3]
        lx, ly = call.label(r, 1), call.label(r, 2)
    shape = call.out.shape
    lx, ly = settle(r, expand(lx, shape)), settle(r, expand(ly, shape))
    if lx is None:
        x, y, lx, ly = y, x, ly, lx
    if lx is None:
        return
    chosen(r, mask, lx, ly, call.out)
    if ly is None:
        beside_constant(r, lx, value(y, call.out))
    elif len(lx.fields) == len(ly.fields):
        for f, g in zip(lx.fields, ly.fields, strict=True):
            r.ids.same(f, g)
    else:
        freeze(r, lx, ly)
    r.set(call.out, lx.fields)


def chosen(r: Record, mask: Tensor, lx: Label, ly: Label | None, out: Tensor) -> None:
    """A mask that varies over a space must be computed from that space, element by element."""
    places = mask.expand(out.shape)
    lm = expand(r.get(mask), out.shape)
    for f in lx.fields:
        if uniform(places, varies(f)):
            continue
        own = [g for g in (lm.fields if lm is not None else ()) if varies(g) == varies(f)]
        if not own:
            r.ids.freeze(f)
            continue
        for label in (lx, ly):
            for h in label.fields if label is not None else ():
                if varies(h) == varies(f):
                    r.ids.same(own[0], h)
                    r.ids.mark(h, Mark.NO_MIX)
                    r.ids.fix(h)


def beside_constant(r: Record, label: Label, v: Tensor) -> None:
    if bool((v != 0).any()):
        for f in label.fields:
            r.ids.fix(f)
            r.ids.mark(f, Mark.NO_MIX)
            if not uniform(v, varies(f)):
                r.ids.colour(f, v)


def compare(r: Record, call: Call) -> None:
    """eq, lt, …: with one number, a mask that belongs to the coordinates; anything else makes data of them."""
    labels = [call.label(r, i) for i in range(2)]
    if labels[0] is not None and labels[1] is None and call.args[0].shape == call.out.shape:
        y = call.args[1]
        if not isinstance(y, Tensor) or uniform(y, range(y.dim())):
            r.put(call.out, Label(nonlinear(r, labels[0]).fields))
            return
    data(r, call)


def masked(r: Record, call: Call) -> None:
    """isnan and its like: a mask that belongs to the coordinates."""
    label = call.label(r, 0)
    if label is not None:
        r.put(call.out, Label(nonlinear(r, label).fields))


def data(r: Record, call: Call) -> None:
    """Values become data: decisions in Python, indices. Only a router's scores may."""
    for t in call.tensors:
        label = r.get(t)
        if label is not None and not any(
            r.ids.marked(a, Mark.ROUTER) for f in label.fields for a in unique_list(f)
        ):
            freeze(r, label)


def ignore(r: Record, call: Call) -> None:
    """Nothing of the values is used."""
