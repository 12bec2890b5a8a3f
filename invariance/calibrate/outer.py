"""Σ x xᵀ over batches of tokens, as fast as it is exact."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float, Float64
from torch import Tensor

SMALL = 128  # products of fewer columns are not divided further
LARGE = 2**21  # numbers of a product that are in memory before they are added


def add_outer(x: Float[Tensor, "c n d"], total: Float64[Tensor, "c d d"]) -> None:
    """Add Σ x xᵀ of one batch to the sum of each copy, in float64 and in place. bfloat16 signals are multiplied by the fast
    bfloat16 units, exactly: their products are exact in float32, in which the sums over one batch are taken."""
    with _exact_fast_products(x.dtype is torch.bfloat16):
        f = (x if x.dtype is torch.float64 else x.float()).detach()
        for m, out in zip(f, total, strict=True):  # batched products are half as fast on CPUs
            _add_gram(m, out)


def _add_gram(x: Float[Tensor, "n d"], out: Float64[Tensor, "d d"]) -> None:
    """Xᵀ X. It is symmetric: of its four quarters, one is another's transpose and is not multiplied; so on inside them."""
    h = x.shape[1] // 2
    if h < SMALL:
        out += (x.mT @ x).to(out.device)
        return
    step = max(LARGE // (x.shape[1] - h), 1)
    for first in range(0, h, step):
        rows = slice(first, min(first + step, h))
        part = (x[:, rows].mT @ x[:, h:]).to(out.device)
        out[rows, h:] += part
        out[h:, rows] += part.mT
    _add_gram(x[:, :h], out[:h, :h])
    _add_gram(x[:, h:], out[h:, h:])


@contextmanager
def _exact_fast_products(allowed: bool) -> Iterator[None]:
    """Let float32 products round their FACTORS to bfloat16 or TF32: no loss when the factors are bfloat16 already."""
    cpu, cuda = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul  # type: ignore[attr-defined]
    before = cpu.fp32_precision, cuda.fp32_precision
    try:
        cpu.fp32_precision, cuda.fp32_precision = ("bf16", "tf32") if allowed else ("ieee", "ieee")
        yield
    finally:
        cpu.fp32_precision, cuda.fp32_precision = before
