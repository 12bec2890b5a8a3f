"""Rotator `output_aware`: directions that carry the signal, or that the output hangs on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float64
from torch import Tensor

from invariance.calibrate.moments import Moments
from invariance.calibrate.statistic import Statistic
from invariance.core.change import Basis
from invariance.core.group import Group
from invariance.core.space import Space
from invariance.method.interfaces import Rotator


@dataclass(frozen=True)
class OutputAware(Rotator, name="output_aware"):
    """Eigenvectors of τC + H/τ: C the second moment of the signal, H the output-KL Fisher, both at unit trace.

    A direction goes when it neither carries much nor sways the output much. Large ``tau`` is `pca`, small ``tau``
    looks at the output alone. Energies are the eigenvalues, which are no nats.

    Source: arXiv:2609.35579, its residual basis.
    """

    tau: float = 1.0  # how much the signal counts against the output
    of: Literal["raw", "normed"] = (
        "raw"  # the signal as it is, or at unit RMS as its readers see it
    )
    produces = Group.ORTHOGONAL
    kinds = frozenset({"residual"})

    def __post_init__(self) -> None:
        if not self.tau > 0:
            raise ValueError("tau must be above 0")

    @property
    def needs(self) -> frozenset[Statistic]:
        return frozenset({Statistic(self.of), Statistic.FISHER})

    def fit(self, space: Space, moments: Moments) -> Basis:
        C, H = moments.second(space, self.of), moments.second(space, Statistic.FISHER)
        energy, Q = torch.linalg.eigh(self.tau * unit_trace(C) + unit_trace(H) / self.tau)
        return Basis(
            Q.flip(-1), energy.flip(-1).clamp_min(0)
        )  # eigh ascends; slicers keep from the left


def unit_trace(M: Float64[Tensor, "c d d"]) -> Float64[Tensor, "c d d"]:
    trace = M.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
    return M / trace.clamp_min(torch.finfo(M.dtype).tiny)
