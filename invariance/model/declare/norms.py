"""Norms told by what they compute: LayerNorm, or RMSNorm with its eps and its gain in one of the ways of ``Rms``."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from ...core.errors import InputError
from ..architecture import Rms
from ..derive.precision import Double, double
from ..layers import Norm
from .signals import same

SMALL = 1e-3  # signals of this size, and eps shows


def rms_of(norm: nn.Module) -> Rms | None:
    """How a module that computes an RMSNorm keeps it; None where it computes something else."""
    own = dict(norm.named_parameters())
    if own.keys() != {"weight"} or own["weight"].dim() != 1:
        return None
    gain = own["weight"]
    x = SMALL * torch.arange(3 * len(gain), dtype=torch.float64).sin().reshape(3, -1)
    with double(), Double():
        theirs = norm(x)
    for name, eps in vars(norm).items():
        for offset in (0.0, 1.0):
            if isinstance(eps, float):
                ours = Norm(len(gain), eps, False, gain, None, offset)
                if same(theirs, ours(x)):
                    return Rms(name, offset)
    return None


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm that the grammar knows."""
    return isinstance(module, nn.LayerNorm) or rms_of(module) is not None


def one_rms(norms: Iterable[nn.Module]) -> Rms:
    """How all of these norms are kept. Raises InputError where that differs."""
    found = {rms_of(norm) for norm in norms if not isinstance(norm, nn.LayerNorm)}
    if len(found) > 1:
        raise InputError("its RMSNorms compute different things")
    return next((rms for rms in found if rms is not None), Rms())
