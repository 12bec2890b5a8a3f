"""Slicer `truncate`: keep the first k directions."""

from __future__ import annotations

from dataclasses import dataclass

from invariance.calibrate.moments import Moments
from invariance.core.change import Basis, Change
from invariance.core.space import Space
from invariance.method.interfaces import Slicer


@dataclass(frozen=True)
class Truncate(Slicer, name="truncate"):
    """Keep the first k directions of the basis; nobody makes up for the rest.

    E and D are the first k columns of A and A⁻ᵀ, so E Dᵀ is a projector.

    Source: Ashkboos et al. 2024, arXiv:2401.15024, section 3.4.
    """

    kinds = Slicer.kinds | {"heads", "experts"}
    prefix = True

    def cut(self, space: Space, basis: Basis, k: int, moments: Moments) -> Change:
        return Change.rotation(basis.A).columns(space.kept(k))
