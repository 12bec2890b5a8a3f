"""Whether an architecture that was read holds, also where signals are loud and positions far."""

from __future__ import annotations

import copy

import torch
from torch import nn

from ...core.change import Change
from ...core.errors import InputError
from ..architecture import Architecture
from ..derive.certify import TOLERANCE, distance, louder, outputs
from ..derive.probes import probes
from ..folding import canonical
from ..reparametrize import reparametrize
from ..tiny import Tiny


def prove(made: Tiny, arch: Architecture) -> None:
    """Raises InputError where the rewritten and rotated small model computes something else than the family's own code."""
    for probe in probes(made.model, made.tokens, made.config.to_dict()):
        loud = louder(made.model, probe.loud)
        error = distance(outputs(loud, probe.example), outputs(_rotated(loud, arch), probe.example))
        if not error <= TOLERANCE:
            raise InputError(
                f"at {probe.name}, a small model of its config gives other logits once its blocks are rewritten and rotated, "
                f"by {error:.1e}: it computes something that the grammar has no words for"
            )


@torch.no_grad()
def _rotated(model: nn.Module, arch: Architecture) -> nn.Module:
    """A copy in canonical form, with a random element of its group on every space."""
    twin = copy.deepcopy(model)
    layout = canonical(twin, arch, fold=True)  # type: ignore[arg-type]
    changes = {name: Change.rotation(space.element(1)) for name, space in layout.spaces.items()}
    reparametrize(twin, layout, changes)  # type: ignore[arg-type]
    return twin
