"""How much of all continuous symmetry is derived? Groups against the null space of ∂outputs/∂weights, on tiny models.

python benchmarks/completeness.py llama qwen3 gpt2
"""

from __future__ import annotations

import sys

import torch

from invariance.model.derive import derive
from invariance.model.derive.completeness import dimensions, null_space
from invariance.model.tiny.build import built, from_values

TYPES = [
    "llama",
    "qwen3",
    "gemma2",
    "olmo2",
    "gpt_neox",
    "bloom",
    "starcoder2",
    "stablelm",
    "cohere",
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
    "pad_token_id": None,
}


def compared(kind: str) -> str:
    small = built(from_values(kind, SMALLER), 0)
    ids = torch.randint(0, 13, (26, 8), generator=torch.Generator().manual_seed(0))
    example = {"input_ids": ids, "use_cache": False}
    groups = dimensions(derive(small.model, [example]))
    weights = sum(p.numel() for p in small.model.parameters())
    null = null_space(small.model, example)
    return f"| {kind} | {weights} | {null} | {sum(groups.values())} | {dict(groups)} |"


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("| type | weights | null space | derived | by kind |\n|---|---|---|---|---|")
    for kind in sys.argv[1:] or TYPES:
        print(compared(kind), flush=True)
