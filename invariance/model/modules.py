"""The few modules that every supported model is made of once its blocks are rewritten: Norm, branches, Stage, Block."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class Norm(nn.Module):
    """RMSNorm and LayerNorm in one: x / √(Σx²/d + eps), with d the ORIGINAL width, whatever width x has now.

    ``centred`` subtracts the mean first (LayerNorm). ``gain`` and ``bias`` are None once folded into the readers; the
    signal is multiplied by ``offset`` + gain. Computes in float32 at least, in float64 if x is.
    """

    def __init__(
        self,
        d: int,
        eps: float,
        centred: bool,
        gain: Tensor | None,
        bias: Tensor | None,
        offset: float = 0.0,
    ) -> None:
        super().__init__()
        self.d, self.eps, self.centred, self.offset = d, eps, centred, offset
        self.gain = (
            None if gain is None else nn.Parameter(gain.detach(), requires_grad=gain.requires_grad)
        )
        self.bias = (
            None if bias is None else nn.Parameter(bias.detach(), requires_grad=bias.requires_grad)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = x if x.dtype == torch.float64 else x.float()
        if self.centred:
            h = h - h.mean(-1, keepdim=True)
        length = torch.linalg.vector_norm(
            h, dim=-1, keepdim=True
        )  # h² is never stored: five times as fast on CPUs
        h = h * torch.rsqrt(length.square() / self.d + self.eps)
        if self.gain is not None and self.offset:
            h = h * (self.offset + self.gain.to(h.dtype))
        h = h.to(x.dtype)
        if self.gain is not None and not self.offset:
            h = h * self.gain
        return h if self.bias is None else h + self.bias

    def extra_repr(self) -> str:
        return f"d={self.d}, eps={self.eps}, centred={self.centred}, folded={self.gain is None}"


class Factored(nn.Module):
    """second(first(x)): a matrix W (out, in) as two, with a space of min(in, out) dims between them."""

    def __init__(self, first: nn.Linear, second: nn.Linear) -> None:
        super().__init__()
        self.first, self.second = first, second

    @classmethod
    def split(cls, linear: nn.Linear) -> Factored:
        """Exactly: one factor is W, that on its shorter side the identity. The bias stays on the second."""
        W, bias = linear.weight, linear.bias
        n_out, n_in = W.shape
        first, second = (
            nn.Linear(n_in, min(n_in, n_out), bias=False, device="meta"),
            nn.Linear(min(n_in, n_out), n_out, bias=False, device="meta"),
        )
        eye = nn.Parameter(
            torch.eye(min(n_in, n_out), dtype=W.dtype, device=W.device), W.requires_grad
        )
        first.weight, second.weight = (eye, W) if n_in <= n_out else (W, eye)
        second.bias = bias
        return cls(first, second)

    def joined(self) -> nn.Linear:
        """The product as one matrix."""
        W = (self.second.weight.double() @ self.first.weight.double()).to(self.second.weight)
        whole = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        whole.weight = nn.Parameter(W, self.second.weight.requires_grad)
        whole.bias = self.second.bias
        if self.first.bias is not None:
            bias = self.second.weight.double() @ self.first.bias.double()
            bias = bias if whole.bias is None else bias + whole.bias.double()
            whole.bias = nn.Parameter(bias.to(W), self.first.bias.requires_grad)
        return whole

    @property
    def in_features(self) -> int:
        return self.first.in_features

    @property
    def out_features(self) -> int:
        return self.second.out_features

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


Linear = nn.Linear | Factored


def factors(linear: Linear) -> tuple[nn.Linear, ...]:
    """The matrices that a linear layer multiplies by, in turn."""
    return (linear,) if isinstance(linear, nn.Linear) else (linear.first, linear.second)


class Attention(nn.Module):
    """Softmax attention whose query/key width and value width are read off its weights, and so may differ.

    ``q_norm`` and ``k_norm`` norm each head's queries and keys, where the family does so, before positions turn them.
    Rotary positions turn the leading dims for which the model supplies angles; ``pairs`` (KV head, pair) says which
    of the model's frequencies turns each pair that is left, where that is not the one at its own place.
    """

    def __init__(
        self,
        q: Linear,
        k: Linear,
        v: Linear,
        out: Linear,
        origin: nn.Module,
        heads: int,
        kv_heads: int,
        q_norm: Norm | None = None,
        k_norm: Norm | None = None,
    ) -> None:
        nn.Module.__init__(self)  # not what a family's class does, of which this may be one
        self.q, self.k, self.v, self.out = q, k, v, out
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
        own = sys.modules[type(origin).__module__]
        self.eager: Callable[..., Any] = getattr(
            own, "eager_attention_forward", sdpa_attention_forward
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


class Mlp(nn.Module):
    """down(act(up x)), or down(act(gate x) · up x) where there is a gate."""

    def __init__(self, gate: Linear | None, up: Linear, down: Linear, act: nn.Module) -> None:
        super().__init__()
        self.gate, self.up, self.down, self.act = gate, up, down, act

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.up(x)) if self.gate is None else self.act(self.gate(x)) * self.up(x)
        return self.down(h)


class Stage(nn.Module):
    """x ↦ shortcut(x) + Σ branch(norm(x)): one step of the residual stream. A parallel block has one, of two branches.

    Where there is a norm ``post``, what the branch gives passes it before it is added.

    ``shortcut`` carries x from this stage's basis to the next one's: a matrix (source width, target width), or, where
    it is ``low_rank``, F (width, rank) in place of I − F Fᵀ. None where x passes as it is. A stage without branches has
    no norm either and passes the stream on.
    """

    def __init__(
        self,
        norm: Norm | None,
        attention: Attention | None,
        mlp: Mlp | None,
        post: Norm | None = None,
    ) -> None:
        super().__init__()
        self.norm, self.attention, self.mlp, self.post = norm, attention, mlp, post
        self.shortcut: nn.Parameter | None = None
        self.low_rank = False

    @property
    def branches(self) -> list[nn.Module]:
        return [b for b in (self.attention, self.mlp) if b is not None]

    def linears(self) -> dict[str, Linear]:
        """The linear layers of its branches, by their names there."""
        found = [(n, m) for b in self.branches for n, m in b.named_children()]
        return {n: m for n, m in found if isinstance(m, Linear)}

    def drop(self, branch: str) -> None:
        """Let a branch go, by its name, and with the last one the norms."""
        setattr(self, branch, None)
        if not self.branches:
            self.norm = self.post = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the branches compute in; the stream itself may be kept in a finer one."""
        return next(self.branches[0].parameters()).dtype

    def carry(self, x: Tensor) -> Tensor:
        """What reaches the end of the stage beside its branches."""
        if self.shortcut is None:
            return x
        M = self.shortcut.to(x.dtype)
        return x - (x @ M) @ M.mT if self.low_rank else x @ M

    def write(self, x: Tensor, **kwargs: Any) -> list[Tensor]:
        """What each branch gives, before any norm behind it."""
        if self.norm is None:
            return []
        h = self.norm(x).to(self.dtype)
        written = [] if self.attention is None else [self.attention(h, **kwargs)[0]]
        return written if self.mlp is None else [*written, self.mlp(h)]

    def land(self, x: Tensor, written: list[Tensor]) -> Tensor:
        """The stream behind the stage, from the stream before it and what its branches give."""
        y = self.carry(x)
        for out in written:
            y = y + (out if self.post is None else self.post(out))
        return y

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.land(x, self.write(x, **kwargs))


class Block(GradientCheckpointingLayer):
    """The stages of one decoder layer, behind the signature that transformers calls a layer with."""

    def __init__(self, stages: list[Stage]) -> None:
        nn.Module.__init__(self)
        self.stages = nn.ModuleList(stages)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        for stage in self.stages:
            hidden_states = stage(hidden_states, **kwargs)
        return hidden_states


def as_one_of(theirs: nn.Module, ours: Any) -> Any:
    """A class of ours that passes for the class of a family's layer, whose name it has, while it computes as ours.

    Libraries find layers by their class or by its name: to record hidden states and attentions, to place blocks on
    devices, to wrap them.
    """
    kind: Any = type(theirs)
    return _both(kind, ours)


@cache
def _both(theirs: Any, ours: Any) -> Any:
    return type(theirs.__name__, (ours, theirs), {"__module__": ours.__module__})
