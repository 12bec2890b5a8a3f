"""How much of all continuous symmetry is derived: dimensions of groups against the null space of ∂outputs/∂weights.

At a random point the null space of J = ∂outputs/∂weights is the tangent space of ALL continuous changes of weights that leave
the function as it is. A derivation is complete where its groups have as many dimensions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .analysis import Derived
from .block import Kind
from .precision import Double
from .trace import Example, forward

DROPPED = 1e-11  # singular values below this, relative to the largest, are zero
MORE = 64  # rows of J beyond as many as there are weights


def dimensions(derived: Derived) -> Counter[str]:
    """Of the derived continuous groups, by kind: GL(d) d² − d and its scales, O(d) d(d − 1)/2, O that fixes the ones
    (d − 1)(d − 2)/2, a complex scale 1 and its scale, the free scales of the equations, and gains that fold although they
    have no scale (1 + w)."""
    out: Counter[str] = Counter(scales=derived.scales.free_scales)
    for name, offset in derived.gains.items():
        if offset and name not in derived.unfolded:
            out["gains"] += derived.axes[name, 0].numel()
    for b in derived.blocks:
        d = len(b.classes)
        sizes = {
            Kind.GL: d * d - d,
            Kind.C: 1,
            Kind.O: d * (d - 1) // 2,
            Kind.O1: (d - 1) * (d - 2) // 2,
        }
        out[str(b.kind)] += sizes.get(b.kind, 0)
    return +out


def null_space(model: nn.Module, example: Example) -> int:
    """The dimension of the null space of ∂outputs/∂weights, from random outputs of a model in float64.

    Raises ValueError where the example has too few outputs to tell.
    """
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None  # whose row would have no gradient
    weights = [p.requires_grad_(True) for p in model.parameters()]
    count = sum(p.numel() for p in weights)
    with Double():
        values = torch.cat([t.double().flatten() for t in forward(model, example)])
    if len(values) < count + MORE:
        raise ValueError(f"{len(values)} outputs cannot tell {count} weights apart")
    chosen = torch.randperm(len(values), generator=torch.Generator().manual_seed(0))
    rows = [gradient(values[i], weights) for i in chosen[: count + MORE].tolist()]
    s = torch.linalg.svdvals(torch.stack(rows))
    return int((s < DROPPED * s[0]).sum())


def gradient(value: Tensor, weights: Sequence[Tensor]) -> Tensor:
    found = torch.autograd.grad(value, weights, retain_graph=True, materialize_grads=True)
    return torch.cat([g.flatten() for g in found])
