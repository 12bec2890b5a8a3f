"""Small numbers for a config's keys, by what a key is called and by how its default relates to other defaults.

Widths keep their relations: 4 heads of 8 make a width of 32, and what was twice the width is 64.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

VOCABULARY, WIDTH, HEADS, HEAD, ROTARY, LENGTH = 67, 32, 4, 8, 4, 64
CLIP = 0.5  # queries, keys and values are clipped where a type can clip them, so that certificates reach the clip

_WIDTH = re.compile(
    r"^(hidden_size|d_model|n_embd|n_embed|dim|embed_dim|embedding_size|hidden_dim|emb_dim|model_dim"
    r"|decoder_hidden_size)$"
)
_HEADS = re.compile(
    r"^((num_attention|n|num|(en|de)coder_attention|num_(en|de)coder_attention)_heads?|n_head)$"
)
_KV_HEADS = re.compile(
    r"num_key_value_heads|num_kv_heads|n_head_kv|multi_query_group_num|kv_n_heads|_kv_heads"
)
_TOKEN = re.compile(r"_token_(id|index)s?$")

_SMALL: tuple[tuple[str, int], ...] = (
    (r"vocab_size|^vocab|_vocab$", VOCABULARY),
    (r"(moe|expert|shared_expert)_intermediate|expert_ffn|moe_ffn|ffn_hidden_size_moe", 24),
    (
        r"intermediate|ffn_dim|d_ff|inner_dim|n_inner|^dff$|ffn_hidden|mlp_hidden|dim_ff|feed_forward|d_inner",
        40,
    ),
    (r"nope_head_dim", HEAD),
    (r"rope_head_dim|rotary_dim|rotary_emb_dim", ROTARY),
    (r"qk_head_dim", HEAD + ROTARY),
    (r"(mamba|ssm).*(headdim|head_dim|d_head)|v_head_dim|head_dim|head_size|d_kv|headdim", HEAD),
    (r"(mamba|ssm).*heads", 8),
    (r"q_lora_rank|kv_lora_rank", 12),
    (r"lora_rank|lora_dim|low_rank|lowrank", 6),
    (r"zero_expert", 2),
    (r"experts_per_tok|top_k|topk$|moe_k$|topk_experts", 2),
    (r"^n_group$|^topk_group$|expert_group|n_groups$|ngroups$", 1),
    (r"(num|n)_.*experts$|experts_num|moe_num_experts", 4),
    (r"sliding_window|attention_window|window_size|block_length|chunk_size|attention_chunk", 8),
    (r"position|n_ctx|max_seq|max_sequence|max_target|max_source|max_length|_max_len", LENGTH),
    (r"state_size|d_state", 6),
    (r"time_step_rank|dt_rank", 3),
    (r"linear.*key_heads", 2),
    (r"linear.*value_heads", 4),
    (r"num_.*layers$|n_layers?$|_layers$|^depth$|num_blocks|mem_blocks", 2),
    (r"heads$", HEADS),
    (r"image_size", 32),
    (r"patch_size", 8),
)


def is_layers(key: str) -> bool:
    """Whether a key counts a stack's layers."""
    return bool(
        re.search(r"^(num_hidden_layers|n_layers?|num_layers|num_blocks|depth)$|coder_layers$", key)
    )


def is_token(key: str) -> bool:
    return bool(_TOKEN.search(key))


@dataclass(frozen=True)
class Scale:
    """The default width and heads of a config: what other numbers are compared with."""

    width: int | None
    heads: int | None
    defaults: Mapping[str, Any]

    @classmethod
    def of(cls, defaults: Mapping[str, Any]) -> Scale:
        numbers = {k: v for k, v in defaults.items() if is_number(v)}
        return cls(
            next((v for k, v in numbers.items() if _WIDTH.search(k)), None),
            next((v for k, v in numbers.items() if _HEADS.search(k)), None),
            defaults,
        )

    def small(self, key: str, v: int) -> int:
        """The small value of a number; the number itself where nothing is known of it, or it is small already."""
        if _WIDTH.search(key) and v >= WIDTH:
            return WIDTH
        if _HEADS.search(key):
            return min(v, HEADS)
        if _KV_HEADS.search(key):
            return HEADS if v == self.heads else min(v, HEADS // 2)
        if re.search(r"head_dim|head_size", key) and (related := self.head(v)) is not None:
            return related
        for pattern, n in _SMALL:
            if re.search(pattern, key):
                return self.at_width(v) or min(v, n) if n == 40 else min(v, n)
        return self.at_width(v) or v

    def head(self, v: int) -> int | None:
        """A head's width that equals another one's by default stays equal to it."""
        rope, nope = self.defaults.get("qk_rope_head_dim"), self.defaults.get("qk_nope_head_dim")
        if is_number(rope) and v == rope:
            return ROTARY
        if is_number(rope) and is_number(nope) and v == rope + nope:
            return HEAD + ROTARY
        if is_number(nope) and v == 2 * nope:
            return 2 * HEAD
        if self.width and self.heads and v * self.heads == 2 * self.width:
            return 2 * HEAD
        return None

    def at_width(self, v: int) -> int | None:
        """A number that is the width, or twice or half of it, stays so."""
        if self.width is None or v < WIDTH:
            return None
        for times, over in ((1, 1), (2, 1), (1, 2)):
            if v * over == self.width * times:
                return WIDTH * times // over
        return None


def is_number(v: Any) -> TypeGuard[int]:
    return isinstance(v, int) and not isinstance(v, bool)
