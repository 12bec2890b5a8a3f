"""Convolutions: depthwise ones keep channels apart; full ones contract channels, at every offset alike."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..arrays import varies
from ..record import Record
from .algebra import freeze, plain, product, settle
from .arithmetic import add_labels
from .call import Call
from .contraction import dual


def convolution(r: Record, call: Call) -> None:
    x, w, bias, groups = call.args[0], call.args[1], call.args[2], call.args[8]
    if id(w) in r.names:
        r.weight(w, stacked=False)
    if groups == x.shape[1] == w.shape[0]:
        depthwise(r, x, w, call.out, bias)
    elif groups == 1 and not call.args[6]:
        full(r, x, w, call.out, bias)
    else:
        freeze(r, r.get(x), r.get(w), r.get(bias))


def depthwise(r: Record, x: Tensor, w: Tensor, out: Tensor, bias: Any) -> None:
    """Each channel on its own: its scale is the product of the input's and the kernel's."""
    lx, lw = settle(r, r.get(x)), settle(r, r.get(w))
    if lx is None or lw is None or len(lx.fields) != 1 or varies(lx.fields[0]) != (1,):
        return freeze(r, lx, lw, r.get(bias))
    for f in lw.fields[1:]:
        r.ids.freeze(f)
    channels = x.shape[1]
    shape = (1, channels) + (1,) * (x.dim() - 2)
    f = lx.fields[0][:1].reshape(1, channels, -1)[:, :, 0].reshape(shape)
    g = lw.fields[0].reshape(channels, -1)[:, 0].reshape(shape)
    r.ids.seen(f)
    r.ids.seen(g)
    r.set(out, [product(r, [(f, 1), (g, 1)]).expand(out.shape)])
    add_bias(r, out, bias)


def full(r: Record, x: Tensor, w: Tensor, out: Tensor, bias: Any) -> None:
    """Σ over channels and offsets: dual coordinates at every offset, new ones for the output's channels."""
    lx, lw = settle(r, plain(r.get(x)), True), settle(r, r.get(w))
    if lw is None:
        return freeze(r, lx, r.get(bias))
    outward = [f for f in lw.fields if varies(f) == (0,)]
    inward = [f for f in lw.fields if varies(f) == (1,)]
    for f in lw.fields:
        if varies(f) not in ((0,), (1,)):
            r.ids.freeze(f)
    across = [f for f in (lx.fields if lx is not None else ()) if varies(f) == (1,)]
    if lx is not None and len(lx.fields) == len(across) == len(inward) == 1:
        rows = across[0][:1].reshape(1, x.shape[1], -1)[:, :, :1].transpose(1, 2)
        columns = inward[0][:1].reshape(1, w.shape[1], -1)[:, :, :1]
        dual(r, (rows, lx), (columns, lw))
    else:
        freeze(r, lx)
        for f in inward:
            r.ids.freeze(f)
    if outward:
        f = (
            outward[0]
            .reshape(w.shape[0], -1)[:, 0]
            .reshape((1, w.shape[0]) + (1,) * (out.dim() - 2))
        )
        r.ids.seen(f)
        r.set(out, [f.expand(out.shape)])
    add_bias(r, out, bias)


def add_bias(r: Record, out: Tensor, bias: Any) -> None:
    if bias is not None:
        shape = (1, -1) + (1,) * (out.dim() - 2)
        label = r.get(bias)
        if label is not None:
            placed = bias.detach().reshape(shape)
            r.set(placed, [f.reshape(shape) for f in label.fields], parameter=label.parameter)
            add_labels(r, (out, r.get(out)), (placed, r.get(placed)), out)
