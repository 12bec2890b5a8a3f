"""Norms, and linear layers that may be two factors."""

from __future__ import annotations

import torch
from torch import Tensor, nn


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
