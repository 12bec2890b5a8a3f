"""Σ x xᵀ over a batch of tokens, as fast as it is exact."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

SMALL = 128  # products of fewer columns are not divided further


def outer(x: Float[Tensor, "c n d"]) -> Float[Tensor, "c d d"]:
    """Σ x xᵀ per copy of one batch; batches are added in float64. bfloat16 signals are multiplied by the fast bfloat16
    units, exactly: their products are exact in float32, in which the sums are taken."""
    with _exact_fast_products(x.dtype is torch.bfloat16):
        f = (x if x.dtype is torch.float64 else x.float()).detach()
        total = f.new_empty(len(f), f.shape[-1], f.shape[-1])
        for m, out in zip(
            f, total, strict=True
        ):  # one by one: batched products are half as fast on CPUs
            _gram(m, out)
        return total


def _gram(x: Float[Tensor, "n d"], out: Float[Tensor, "d d"]) -> None:
    """Xᵀ X. It is symmetric: of its four quarters, one is another's transpose and is not multiplied; so on inside them."""
    h = x.shape[1] // 2
    if h < SMALL:
        torch.mm(x.mT, x, out=out)
        return
    torch.mm(x[:, :h].mT, x[:, h:], out=out[:h, h:])
    out[h:, :h] = out[:h, h:].mT
    _gram(x[:, :h], out[:h, :h])
    _gram(x[:, h:], out[h:, h:])


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
