"""Sums, means, squared norms, variances, and norms as one op."""

from __future__ import annotations

from torch import Tensor

from ..arrays import varies
from ..label import Label
from ..record import Record
from .algebra import fibres, freeze, functional, leftover, link, product, release, settle
from .arithmetic import add_labels, multiply_labels
from .call import Call
from .pointwise import nonlinear


def dims_of(call: Call, at: int = 1) -> tuple[int, ...]:
    """The axes that are reduced: all where none is named."""
    n = call.args[0].dim()
    dims = call.kwargs.get(
        "dim", next((a for a in call.args[at:] if isinstance(a, (list, tuple))), None)
    )
    if isinstance(dims, int):
        dims = [dims]
    return tuple(range(n)) if not dims else tuple(d % n for d in dims)


def reduce(r: Record, call: Call) -> None:
    """sum, mean, and the norm Σx²."""
    label, norm = call.label(r, 0), call.op in ("linalg_vector_norm", "norm")
    if label is None:
        return
    if label.parts is not None or (norm and len(call.args) > 1 and call.args[1] not in (2, 2.0)):
        return freeze(r, label)
    squared = norm or label.squared
    settled = settle(r, label) if norm or not squared else label
    assert settled is not None
    dims = dims_of(call)
    fields = [
        g for f in settled.fields if (g := reduce_field(r, f, dims, squared, norm)) is not None
    ]
    if call.out.dim() != call.args[0].dim():
        for d in sorted(dims, reverse=True):
            fields = [f.squeeze(d) for f in fields]
    r.set(call.out, [f.expand(call.out.shape) for f in fields])


def reduce_field(
    r: Record, f: Tensor, dims: tuple[int, ...], squared: bool, norm: bool
) -> Tensor | None:
    """One field without the reduced axes: None where nothing of it is left."""
    along = set(varies(f))
    if not along & set(dims):
        for d in dims:
            f = f.narrow(d, 0, 1)
        return product(r, [(f, 1), (f, 1)]) if squared and not norm else f
    left = along - set(dims)
    if not squared and left and max(along & set(dims)) < max(left):
        return copies(r, f, dims, along)
    fibres(r, f, dims)
    if squared:
        r.ids.contracted_with_itself(f)
    else:
        functional(r, f, dims)
    return leftover(r, f, dims) if left else None


def copies(r: Record, f: Tensor, dims: tuple[int, ...], along: set[int]) -> Tensor:
    """A sum over copies of a space (experts' outputs): an addition."""
    r.ids.seen(f)
    release(r, f)
    for d in dims:
        if d in along:
            r.ids.same(f.narrow(d, 0, 1), f)
        f = f.narrow(d, 0, 1)
    return f


def variance(r: Record, call: Call) -> None:
    """var, std, var_mean: squares and a mean of a whole space; over part of one, rigid."""
    label = settle(r, call.label(r, 0))
    if label is None:
        return
    dims = set(dims_of(call))
    for f in label.fields:
        along = set(varies(f))
        if not along & dims or along - dims:
            r.ids.freeze(f)
        else:
            fibres(r, f, tuple(dims))
            r.ids.contracted_with_itself(f)
            functional(r, f, tuple(dims))


def norm(r: Record, call: Call) -> None:
    """native_layer_norm and _fused_rms_norm, with their gain and bias."""
    x, shape, gain = call.args[:3]
    bias = call.args[3] if call.op == "native_layer_norm" else None
    out = call.outs[0]
    label = settle(r, r.get(x))
    if label is None:
        return freeze(r, r.get(gain), r.get(bias))
    dims = tuple(range(x.dim() - len(shape), x.dim()))
    for f in label.fields:
        along = set(varies(f))
        if not along & set(dims):
            nonlinear(r, Label((f,)))
            continue
        fibres(r, f, dims)
        r.ids.contracted_with_itself(f)
        if call.op == "native_layer_norm":
            functional(r, f, dims)
        if along - set(dims):
            link(r, leftover(r, f, dims).expand(f.shape), f)
    r.put(out, None)
    r.set(out, label.fields)
    if gain is not None:
        multiply_labels(r, (out, r.get(out)), (gain, r.get(gain)), out)
    if bias is not None:
        add_labels(r, (out, r.get(out)), (bias, r.get(bias)), out)


def extreme(r: Record, call: Call) -> None:
    """max, min, logsumexp, any, all: nothing mixes. Over a space only the largest value is left, not where it was."""
    label = settle(r, call.label(r, 0))
    if label is None:
        return
    named = call.at(1, "dim")
    dims = dims_of(call) if not isinstance(named, int) else (named % call.args[0].dim(),)
    fields = []
    for f in nonlinear(r, label).fields:
        across = tuple(d for d in varies(f) if d in dims)
        if across and len(call.outs) > 1:
            r.ids.freeze(f)  # indices over a space are data
        elif across:
            fibres(r, f, across)
            f = leftover(r, f, across) if len(across) < len(varies(f)) else f
        for d in dims:
            f = f.narrow(d, 0, 1)
        fields.append(f)
    out = call.outs[0]
    if out.dim() != call.args[0].dim():
        for d in sorted(dims, reverse=True):
            fields = [f.squeeze(d) for f in fields]
    kept = tuple(f.expand(out.shape) for f in fields if varies(f))
    r.put(out, Label(kept) if kept else None)


def cumulative(r: Record, call: Call) -> None:
    """cumsum: along an axis that holds no space, each coordinate keeps its place."""
    label = call.label(r, 0)
    if label is None:
        return
    d = call.at(1, "dim") % call.args[0].dim()
    if label.parts is not None or any(d in varies(f) for f in label.fields):
        return freeze(r, label)
    settled = settle(r, label)
    r.set(call.out, settled.fields if settled else ())


def cumulative_product(r: Record, call: Call) -> None:
    label = settle(r, call.label(r, 0))
    if label is None:
        return
    nonlinear(r, label, call.op, call.out)
    d = call.at(1, "dim") % call.args[0].dim()
    for f in label.fields:
        if d in varies(f):
            r.ids.freeze(f)
