"""Norms, known by what they compute, and norms over coordinates of which some are gone."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..derive.precision import Double, double

CLOSE = 1e-9


@dataclass(frozen=True)
class Norm:
    """y = gain · (x − mean?) / √(mean square + eps) + bias. ``held``: the attribute that holds eps, if there is one."""

    centred: bool
    eps: float
    held: str | None
    gain: Tensor
    bias: Tensor


class NormOver(nn.Module):
    """A norm over ``of`` coordinates, of which those that are not here are zero.

    mean = Σx / of; variance = Σx² / of − mean². Without centring the mean is left out.
    """

    def __init__(
        self,
        of: int,
        centred: bool,
        eps: float,
        weight: Tensor | None,
        bias: Tensor | None,
        offset: float = 0.0,  # of the gain, which is the weight plus that
    ):
        super().__init__()
        self.of = float(
            of
        )  # no whole number: those follow the widths of weights (``attributes.note``)
        self.centred, self.eps, self.offset = centred, eps, offset
        self.weight = None if weight is None else nn.Parameter(weight.detach(), False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), False)

    def forward(self, x: Tensor) -> Tensor:
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = y.sum(-1, keepdim=True) / self.of if self.centred else 0.0
        variance = y.square().sum(-1, keepdim=True) / self.of - (mean**2 if self.centred else 0.0)
        y = ((y - mean) * torch.rsqrt(variance + self.eps)).to(x.dtype)
        y = y if self.weight is None else y * (self.weight + self.offset)
        return y if self.bias is None else y + self.bias


def recognised(module: nn.Module, width: int) -> Norm | None:
    """What kind of norm a module of this width is, found by trying; None where it is none."""
    twin = copy.deepcopy(module).double()
    eps = {k: float(v) for k, v in vars(module).items() if type(v) is float and 0 < v < 0.1}
    generator = torch.Generator().manual_seed(0)
    size = 3 * max([*eps.values(), 1e-6]) ** 0.5  # so small that a wrong eps shows
    x = size * torch.randn(5, 1, width, generator=generator, dtype=torch.float64)
    try:
        with double(), Double():
            y = twin(x)
    except Exception:  # whatever a module does that is no norm
        return None
    if not isinstance(y, Tensor) or y.shape != x.shape or not bool(torch.isfinite(y).all()):
        return None
    for centred, (name, value) in _guesses(eps):
        u = x - x.mean(-1, keepdim=True) if centred else x
        u = u * torch.rsqrt(u.square().mean(-1, keepdim=True) + value)
        gain = (y[0, 0] - y[1, 0]) / (u[0, 0] - u[1, 0])
        bias = y[0, 0] - gain * u[0, 0]
        if float((gain * u + bias - y).norm()) <= CLOSE * float(y.norm()):
            return Norm(centred, value, name, gain, torch.where(bias.abs() < CLOSE, 0.0, bias))
    return None


def _guesses(eps: dict[str, float]) -> Iterator[tuple[bool, tuple[str | None, float]]]:
    found: list[tuple[str | None, float]] = [*eps.items(), (None, 0.0)]
    for value in (1e-5, 1e-6, 1e-12):
        found.append((None, value))
    finfo = torch.finfo(torch.float64).eps
    found.append((None, finfo))
    for centred in (False, True):
        for guess in found:
            yield centred, guess
