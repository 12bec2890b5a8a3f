"""Tables of vectors, top-k and gather: what is chosen by data."""

from __future__ import annotations

from torch import Tensor

from ..arrays import unique_list, varies
from ..ids import Mark
from ..record import Record, Router
from .algebra import settle
from .call import Call


def embedding(r: Record, call: Call) -> None:
    """Rows by number: which rows there are is data, their elements are coordinates."""
    table = settle(r, r.get(call.args[0]))
    if table is None:
        return
    fields: list[Tensor] = []
    for f in table.fields:
        along = varies(f)
        if 0 in along:
            r.ids.freeze(f)
        elif along:
            fields.append(f[0].expand(call.out.shape))
            for a in unique_list(f):
                r.use(a, None)
    r.set(call.out, fields)


def top(r: Record, call: Call) -> None:
    """topk, sort, argmax: a router, where they go over a space; which token is first is data."""
    x, label = call.args[0], settle(r, call.label(r, 0))
    if label is None:
        return
    d = call.at(2 if call.op == "topk" else 1, "dim", -1)
    d = d % x.dim() if isinstance(d, int) and not isinstance(d, bool) else x.dim() - 1
    across = [f for f in label.fields if d in varies(f)]
    for f in label.fields:
        if d not in varies(f):
            r.ids.freeze(f)
    for f in across:
        ids = tuple(f.movedim(d, -1).reshape(-1, x.shape[d])[0].tolist())
        if not any(router.ids == ids for router in r.routers):
            r.routers.append(Router(ids, len(r.weights)))
        r.ids.fix(f)
        r.ids.mark(f, Mark.NO_MIX | Mark.ROUTER)


def gather(r: Record, call: Call) -> None:
    """Elements by index: from a router's scores, or along an axis that holds no space."""
    label = settle(r, call.label(r, 0))
    if label is None:
        return
    d = call.args[1] % call.args[0].dim()
    for f in label.fields:
        if d in varies(f):
            if not any(r.ids.marked(a, Mark.ROUTER) for a in unique_list(f)):
                r.ids.freeze(f)
            return
    r.set(call.out, [f.gather(d, call.args[2]) for f in label.fields])
