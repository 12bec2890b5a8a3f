"""How much of all continuous symmetry is derived? Compared with the null space of ∂outputs/∂weights, on tiny models.

At a random point the null space of J = ∂outputs/∂weights is the tangent space of ALL continuous changes of weights that leave
the function as it is. Its dimension is compared with that of the derived groups: GL d² - d and its scales, O d(d - 1)/2, O that
fixes the ones (d - 1)(d - 2)/2, a complex scale 1 and its scale, and the free scales of the equations.

    python benchmarks/completeness.py llama qwen3 gpt2
"""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from invariance.model.derive import Derived, Kind, derive
from invariance.model.derive.precision import Double
from invariance.model.derive.trace import forward
from invariance.model.tiny.build import Tiny, built, from_values

TYPES = [
    "llama",
    "qwen3",
    "qwen2",
    "mistral",
    "gpt2",
    "gpt_neox",
    "gemma2",
    "olmo2",
    "phi3",
    "opt",
    "bloom",
    "mamba",
    "starcoder2",
    "granite",
]
SMALLER = {
    "vocab_size": 13,
    "hidden_size": 8,
    "intermediate_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "max_position_embeddings": 8,
    "sliding_window": 8,
}
DROPPED = 1e-11  # singular values below this, relative to the largest, are zero


def dimension(derived: Derived) -> Counter[str]:
    """Dimensions of the derived continuous groups, by kind."""
    out: Counter[str] = Counter(scales=derived.scales.free_scales)
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


def jacobian(small: Tiny, example: dict[str, Any]) -> Tensor:
    """Rows of ∂outputs/∂weights at random outputs, half as many again as there are weights."""
    weights = [p.requires_grad_(True) for p in small.model.parameters()]
    count = sum(p.numel() for p in weights)
    with Double():
        values = torch.cat([t.double().flatten() for t in forward(small.model, example)])
    chosen = torch.randperm(len(values), generator=torch.Generator().manual_seed(0))[
        : 3 * count // 2
    ]
    rows = []
    for i in chosen.tolist():
        grads = torch.autograd.grad(values[i], weights, retain_graph=True, allow_unused=True)
        rows.append(
            torch.cat(
                [
                    (torch.zeros_like(p) if g is None else g).flatten()
                    for p, g in zip(weights, grads, strict=True)
                ]
            )
        )
    return torch.stack(rows)


def compared(kind: str) -> str:
    small = built(from_values(kind, SMALLER), 0)
    ids = torch.randint(0, 13, (26, 8), generator=torch.Generator().manual_seed(0))
    example = {"input_ids": ids, "use_cache": False}
    groups = dimension(derive(small.model, [example]))
    J = jacobian(small, example)
    s = torch.linalg.svdvals(J)
    null = int((s < DROPPED * s[0]).sum()) + max(0, J.shape[1] - len(s))
    return f"| {kind} | {J.shape[1]} | {null} | {sum(groups.values())} | {dict(groups)} |"


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("| type | weights | null space | derived | by kind |\n|---|---|---|---|---|")
    for kind in sys.argv[1:] or TYPES:
        print(compared(kind), flush=True)
