"""Attention whose widths are read off its weights, behind the functions that transformers attends with."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .layers import Linear, Norm


@dataclass(frozen=True)
class Projections:
    """The linear layers of an attention."""

    q: Linear
    k: Linear
    v: Linear
    out: Linear


class Attention(nn.Module):
    """Softmax attention whose query/key width and value width are read off its weights, and so may differ.

    ``q_norm`` and ``k_norm`` norm each head's queries and keys, where the family does so, before positions turn them.
    Rotary positions turn the leading dims for which the model supplies angles; ``pairs`` (KV head, pair) says which
    of the model's frequencies turns each pair that is left, where that is not the one at its own place.
    """

    def __init__(
        self,
        own: Projections,
        origin: nn.Module,
        heads: int,
        kv_heads: int,
        q_norm: Norm | None = None,
        k_norm: Norm | None = None,
    ) -> None:
        nn.Module.__init__(self)  # not what a family's class does, of which this may be one
        self.q, self.k, self.v, self.out = own.q, own.k, own.v, own.out
        self.q_norm, self.k_norm = q_norm, k_norm
        self.heads, self.kv_heads = heads, kv_heads
        self.num_key_value_groups = (
            heads // kv_heads
        )  # read by the attention functions of transformers
        self.config: Any = origin.config
        self.layer_idx: Any = origin.layer_idx
        self.scaling: float = float(origin.scaling)  # type: ignore[arg-type]
        window = getattr(origin.config, "sliding_window", None)  # some families keep it there alone
        self.sliding_window: int | None = getattr(origin, "sliding_window", window)
        self.dropout: float = float(getattr(origin.config, "attention_dropout", None) or 0.0)
        self.is_causal: bool = origin.is_causal  # type: ignore[assignment]
        family = sys.modules[type(origin).__module__]
        self.eager: Callable[..., Any] = getattr(
            family, "eager_attention_forward", sdpa_attention_forward
        )
        self.pairs: Tensor | None
        self.register_buffer("pairs", None)

    def choose(self, pairs: Tensor) -> None:
        """Keep a choice (KV head, pair) among the frequency pairs that there are now, in its order."""
        pairs = pairs.to(next(self.parameters()).device)
        self.pairs = pairs if self.pairs is None else self.pairs.gather(1, pairs)

    def keep_groups(self, kept: Tensor) -> None:
        """The KV groups that its weights have now, among those that they had."""
        self.heads, self.kv_heads = len(kept) * self.num_key_value_groups, len(kept)
        if self.pairs is not None:
            self.pairs = self.pairs[kept.to(self.pairs.device)]

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """What the heads give, and the weights of their sums where the implementation tells them."""
        q = rearrange(self.q(x), "b t (h d) -> b h t d", h=self.heads)
        k = rearrange(self.k(x), "b t (h d) -> b h t d", h=self.kv_heads)
        v = rearrange(self.v(x), "b t (h d) -> b h t d", h=self.kv_heads)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if position_embeddings is not None:
            cos, sin = (self._per_head(p) for p in position_embeddings)
            k = turn(k, cos, sin)
            q = turn(q, spread(cos, self.heads), spread(sin, self.heads))
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, self.eager
        )
        z, weights = attend(
            self,
            q,
            k,
            v,
            attention_mask,
            dropout=self.dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.out(rearrange(z, "b t h d -> b t (h d)")), weights

    def _per_head(self, angles: Tensor) -> Tensor:
        """Cosines or sines (B, T, rotary) for every KV head's own pairs (B, h, T, 2n); for all alike, h = 1."""
        if self.pairs is None:
            return angles.unsqueeze(1)
        both = torch.cat((self.pairs, self.pairs + angles.shape[-1] // 2), -1)
        return rearrange(angles[..., both], "b t h r -> b h t r")


def spread(x: Tensor, heads: int) -> Tensor:
    """What belongs to each KV head (B, h, T, r), for the query heads that share it; one for all stays one."""
    return x if x.shape[1] == 1 else x.repeat_interleave(heads // x.shape[1], 1)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on the leading cos.shape[-1] dims of x, as pairs (j, j + half)."""
    r = cos.shape[-1]
    a, b = x[..., : r // 2], x[..., r // 2 : r]
    (c, d), (s, t) = cos.chunk(2, -1), sin.chunk(2, -1)
    left, right = torch.addcmul(a * c, b, s, value=-1), torch.addcmul(b * d, a, t)
    return torch.cat((left, right, x[..., r:]), dim=-1)
