"""Arrays of coordinate ids: views without their repeated axes, unique values, what varies along which axis.

A label is an integer array of its tensor's own shape. It is mostly expanded (stride 0), so everything here looks at the
part that is really stored, its core: a label of a large tensor costs what it was before it was expanded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor


def core(field: Tensor) -> Tensor:
    """``field`` without the axes along which it is repeated: each of those has length 1."""
    for d in range(field.dim()):
        if field.shape[d] > 1 and field.stride(d) == 0:
            field = field.narrow(d, 0, 1)
    return field


def cores(*fields: Tensor) -> list[Tensor]:
    """Several arrays, broadcast to one shape, without the axes along which all of them are repeated."""
    parts = list(torch.broadcast_tensors(*fields))
    for d in range(parts[0].dim()):
        if parts[0].shape[d] > 1 and all(p.stride(d) == 0 for p in parts):
            parts = [p.narrow(d, 0, 1) for p in parts]
    return parts


def unique(field: Tensor) -> Tensor:
    """The sorted ids of a field."""
    return torch.unique(core(field))


def unique_list(field: Tensor) -> list[int]:
    """The sorted ids of a field that stand for a coordinate: -1 marks places that hold none."""
    return [a for a in unique(field).tolist() if a >= 0]


def unique_pairs(f: Tensor, g: Tensor) -> tuple[Tensor, Tensor, torch.Size]:
    """Pairs of ids that stand at one place: (n × 2 pairs, the pair of each place, the shape of the places)."""
    f, g = cores(f, g)
    base = int(g.max()) + 2 if g.numel() else 1
    codes, inverse = torch.unique((f + 1) * base + (g + 1), return_inverse=True)
    return torch.stack((codes // base - 1, codes % base - 1), 1), inverse, f.shape


def unique_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Different rows in order of appearance, and which of them each row is. A random hash stands for a row."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(1, 2**62, (rows.shape[1],), generator=generator, dtype=torch.int64)
    _, inverse = torch.unique((rows * weights).sum(1), return_inverse=True)
    count = int(inverse.max()) + 1 if inverse.numel() else 0
    first = torch.full((count,), rows.shape[0], dtype=torch.int64)
    first = first.scatter_reduce(0, inverse, torch.arange(rows.shape[0]), "amin")
    order = torch.argsort(first)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(count))
    return rows[first[order]], rank[inverse]


def varies(field: Tensor, dims: Iterable[int] | None = None) -> tuple[int, ...]:
    """The axes (of ``dims``) along which a field changes."""
    c = core(field)
    axes = range(field.dim()) if dims is None else dims
    return tuple(d for d in axes if c.shape[d] > 1 and bool((c != c.narrow(d, 0, 1)).any()))


def uniform(values: Tensor, dims: Iterable[int]) -> bool:
    """Whether an array of values does not change along ``dims``."""
    return all(
        values.shape[d] == 1
        or values.stride(d) == 0
        or bool((values == values.narrow(d, 0, 1)).all())
        for d in dims
    )


def overlapping(fields: Sequence[Tensor]) -> tuple[int, int] | None:
    """Two fields that change along one axis, if there are two."""
    along = [set(varies(f)) for f in fields]
    for i in range(len(fields)):
        for j in range(i + 1, len(fields)):
            if along[i] & along[j]:
                return i, j
    return None


def line(field: Tensor) -> Tensor:
    """The ids of a field along the axes on which it changes, row by row; other axes are taken at 0."""
    along = varies(field)
    c = core(field)
    rest = [d for d in range(c.dim()) if d not in along]
    sizes = [c.shape[d] for d in along]
    return c.permute(*along, *rest).reshape(*sizes, -1)[..., 0].reshape(-1)


def rows_of(weight: Tensor, field: Tensor) -> tuple[Tensor, Callable[[Tensor], None]]:
    """A weight as lines × the rest, and what writes such an array back."""
    along = varies(field)
    rest = [d for d in range(field.dim()) if d not in along]
    view = weight.data.permute(*along, *rest)
    lines = math.prod(field.shape[d] for d in along)

    def put(rows: Tensor) -> None:
        view.copy_(rows.reshape(view.shape))

    return view.reshape(lines, -1), put
