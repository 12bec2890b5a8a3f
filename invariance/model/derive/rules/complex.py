"""Rotary positions written with complex numbers: a pair of coordinates times cos + i sin."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..label import Label, Terms
from ..record import Record
from .algebra import as_terms, freeze
from .call import Call


def as_complex(r: Record, call: Call) -> None:
    """Pairs along the last axis become one complex number."""
    label = r.get(call.args[0])
    if label is None:
        return
    if len(label.fields) != 1 or label.squared:
        return freeze(r, label)
    terms = as_terms(label, call.args[0].shape)
    real, imaginary = (tuple((f[..., k], c[..., k]) for f, c in terms) for k in (0, 1))
    r.put(call.out, Label((label.fields[0][..., 0],), parts=(real, imaginary)))


def as_real(r: Record, call: Call) -> None:
    label = r.get(call.args[0])
    if label is None:
        return
    if label.parts is None:
        return freeze(r, label)
    real, imaginary = label.parts
    terms = tuple(
        (torch.stack((f, g), -1), torch.stack((c, d), -1))
        for (f, c), (g, d) in zip(real, imaginary, strict=True)
    )
    r.set(call.out, [terms[0][0]], terms=terms)


def multiply_complex(
    r: Record, one: tuple[Any, Label | None], two: tuple[Any, Label | None], out: Tensor
) -> bool:
    """(a + ib)(c + is) with constants c, s. False where nothing here is complex."""
    (x, lx), (y, ly) = one, two
    if lx is None:
        x, y, lx, ly = y, x, ly, lx
    if lx is None or lx.parts is None or ly is not None or not isinstance(y, Tensor):
        return False
    turn = (y if y.is_complex() else y.to(torch.complex128)).expand(out.shape)

    def times(part: Terms, v: Tensor) -> Terms:
        return tuple((f.expand(out.shape), k.expand(out.shape) * v) for f, k in part)

    real, imaginary = lx.parts
    parts = (
        times(real, turn.real) + times(imaginary, -turn.imag),
        times(imaginary, turn.real) + times(real, turn.imag),
    )
    r.put(out, replace(lx, fields=(lx.fields[0].expand(out.shape),), parts=parts))
    return True
