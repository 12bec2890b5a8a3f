"""Matrix products: dual coordinates along the contracted axis; what stands beside it becomes nodes above fibres."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..arrays import uniform, unique_list, varies
from ..ids import Mark
from ..label import Label
from ..record import Fold, Record
from .algebra import changed, combine, fibres, freeze, functional, leftover, plain, release, settle
from .arithmetic import add_labels
from .call import Call
from .rotary import rotary

Side = tuple[Tensor, int]  # a field of the output, and which factor it comes from


def matmul(r: Record, call: Call) -> None:
    """mm, bmm, mv, dot, addmm, baddbmm, addmv: brought to batches of matrices, then contracted."""
    bias: Any = None
    if call.op in ("addmm", "baddbmm", "addmv"):
        bias, x, y = call.args[:3]
    else:
        x, y = call.args[:2]
    lx, ly = r.get(x), r.get(y)
    if any(label is not None and label.parts is not None for label in (lx, ly)):
        return freeze(r, lx, ly)
    flat, one_row, one_column = x.dim() < 3, x.dim() == 1, y.dim() == 1
    if one_column:
        y, ly = unsqueezed(y, ly, 1)
    if one_row:
        x, lx = unsqueezed(x, lx, 0)
    if flat:
        (x, lx), (y, ly) = unsqueezed(x, lx, 0), unsqueezed(y, ly, 0)
    fields = contract(r, (x, lx), (y, ly))
    if flat:
        fields = [f[0] for f in fields]
    if one_column:
        fields = [f[..., 0] for f in fields]
    if one_row:
        fields = [f[0] for f in fields]
    r.put(call.out, None)
    r.set(call.out, [f.expand(call.out.shape) for f in fields])
    if bias is not None and call.kwargs.get("beta", 1) != 0:
        if call.kwargs.get("beta", 1) != 1 or call.kwargs.get("alpha", 1) != 1:
            return freeze(r, r.get(call.out), r.get(bias))
        add_labels(r, (call.out, r.get(call.out)), (bias, r.get(bias)), call.out)


def unsqueezed(t: Tensor, label: Label | None, at: int) -> tuple[Tensor, Label | None]:
    return t.unsqueeze(at), None if label is None else changed(label, lambda f: f.unsqueeze(at))


def contract(
    r: Record, one: tuple[Tensor, Label | None], two: tuple[Tensor, Label | None]
) -> list[Tensor]:
    """B × N × K times B × K × M: the fields of the product."""
    (x, lx), (y, ly) = one, two
    shape = (x.shape[0], x.shape[1], y.shape[2])
    if lx is not None and ly is not None and lx.terms and ly.terms and len(lx.terms) > 1:
        turned = rotary(r, lx, ly)
        if turned is not None:
            return outer(
                r, [(leftover(r, turned[0], (2,)), 0), (leftover(r, turned[1], (1,)), 1)], shape
            )
    lx, ly = settle(r, plain(lx), True), settle(r, plain(ly), True)
    across_x = [f for f in (lx.fields if lx else ()) if 2 in varies(f)]
    across_y = [f for f in (ly.fields if ly else ()) if 1 in varies(f)]
    sides = [(f.narrow(2, 0, 1), 0) for f in (lx.fields if lx else ()) if 2 not in varies(f)]
    sides += [(f.narrow(1, 0, 1), 1) for f in (ly.fields if ly else ()) if 1 not in varies(f)]
    for f, side in sides:
        beside(r, f, (y, ly) if side == 0 else (x, lx))
    if len(across_x) == 1 and len(across_y) == 1:
        assert lx is not None and ly is not None
        sides += dual(r, (across_x[0], lx), (across_y[0], ly))
    elif len(across_x) > 1 or len(across_y) > 1:
        for f in (*across_x, *across_y):
            release(r, f)
            r.ids.freeze(f)
    else:
        for f in across_x:
            sides += with_constant(r, f, 2, y, 0)
        for f in across_y:
            sides += with_constant(r, f, 1, x, 1)
    return outer(r, sides, shape)


def outer(r: Record, sides: list[Side], shape: tuple[int, ...]) -> list[Tensor]:
    return combine(r, [f.expand(shape) for f, _ in sides if varies(f)])


def beside(r: Record, f: Tensor, other: tuple[Tensor, Label | None]) -> None:
    """A field that is not contracted; heads that meet something without a name are told apart by it."""
    release(r, f)
    r.ids.seen(f)
    values, label = other
    named = any(0 in varies(g) for g in (label.fields if label is not None else ()))
    if 0 in varies(f) and not named and not uniform(values, (0,)):
        for b in range(f.shape[0]):
            r.ids.seen(f[b])
        r.ids.colour(f, values.abs().sum((1, 2)).reshape(-1, 1, 1))


def dual(r: Record, one: tuple[Tensor, Label], two: tuple[Tensor, Label]) -> list[Side]:
    """Σ_k x_k y_k: what changes x by A changes y by the inverse of Aᵀ."""
    ids, ((f, lx), (g, ly)) = r.ids, (one, two)
    for own, other in ((f, ly), (g, lx)):
        waits = any(a in r.gains for a in unique_list(own))
        if waits and (other.parameter is None or other.parameter[1] != 0):
            release(r, own)
    rows = f if 1 in varies(f) else f.narrow(1, 0, 1)
    columns = g if 2 in varies(g) else g.narrow(2, 0, 1)
    wide = columns.unsqueeze(1).expand(columns.shape[0], rows.shape[1], *columns.shape[1:])
    pairs = ids.pairs(rows.unsqueeze(3), wide)
    ids.met(pairs)
    for a, b in pairs:
        r.contracted |= {a, b}
        for gained, reader in ((a, b), (b, a)):
            gain = r.gains.get(gained)
            r.use(reader, None if gain is None else Fold(gain.name, gain.index, 1))
        ids.relate(a, b, -1)
    fibres(r, f, (2,))
    fibres(r, g, (1,))
    if lx.parameter is None and ly.parameter is None:
        ids.mark(f, Mark.ACTIVATION)
        ids.mark(g, Mark.ACTIVATION)
    sides: list[Side] = []
    if set(varies(f)) - {2}:
        sides.append((leftover(r, f, (2,)), 0))
    if set(varies(g)) - {1}:
        sides.append((leftover(r, g, (1,)), 1))
    return sides


def with_constant(r: Record, f: Tensor, dim: int, other: Tensor, side: int) -> list[Side]:
    """A space contracted with constants: a sum where they are all equal, else rigid."""
    fibres(r, f, (dim,))
    release(r, f)
    if uniform(other, (1 if dim == 2 else 2,)):
        functional(r, f, (dim,))
    else:
        r.ids.freeze(f)
    return [(leftover(r, f, (dim,)), side)] if set(varies(f)) - {dim} else []
