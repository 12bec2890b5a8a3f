"""Selector `uniform`: the same share of every space."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float64
from torch import Tensor

from invariance.core.errors import InputError
from invariance.core.space import Space
from invariance.method.budget import Bill
from invariance.method.interfaces import Selector


@dataclass(frozen=True)
class Uniform(Selector, name="uniform"):
    """Every space keeps the same fraction of its directions (``keep``), or the same number (``width``).

    A fraction is rounded down to a width that the step's ``widths`` and the space allow (multiples, whole frequency
    pairs); a number must be one of those. With neither, the recipe's budget decides the fraction: the largest that
    stays within it. ``multiple_of`` is short for that of `widths`; width 0, where `widths` has `min: 0`, lets a branch go.
    """

    keep: float | None = None
    width: int | None = None
    multiple_of: int = 1
    alternatives: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"keep", "width"}),)

    def __post_init__(self) -> None:
        if self.keep is not None and self.width is not None:
            raise ValueError("give `keep` (a fraction) or `width` (a number), not both")
        if self.keep is not None and not 0 < self.keep <= 1:
            raise ValueError("keep must be above 0 and at most 1")
        if self.width is not None and self.width < 0:
            raise ValueError("width must be at least 0")
        if self.multiple_of < 1:
            raise ValueError("multiple_of must be at least 1")

    @property
    def needs_budget(self) -> bool:
        return self.keep is None and self.width is None

    def allocate(
        self,
        spectra: Mapping[Space, Float64[Tensor, "c d"] | None],
        cost: Bill,
        budget: float | None,
    ) -> Mapping[Space, int]:
        if self.width is not None:
            return {
                space: space.dim
                if space in cost.protected
                else self._exact(space, cost.widths[space], self.width)
                for space in spectra
            }
        if self.keep is not None:
            return _share(cost, self.keep)
        assert budget is not None
        tried = sorted(
            {s.fraction(k) for s, allowed in cost.widths.items() for k in allowed}, reverse=True
        )
        n = bisect_left(tried, True, key=lambda fraction: cost(_share(cost, fraction)) <= budget)
        return _share(cost, tried[min(n, len(tried) - 1)])

    def _exact(self, space: Space, allowed: tuple[int, ...], width: int) -> int:
        """The width asked for. Raises InputError, with the nearest that there are, where it is not allowed."""
        if width > space.dim:
            raise InputError(
                f"width {width} is more than the {space.dim} directions of space '{space.name}'. "
                "Give a smaller width, or a fraction (`keep`)."
            )
        n = bisect_left(allowed, width)
        if n < len(allowed) and allowed[n] == width:
            return width
        near = " or ".join(str(k) for k in allowed[max(n - 1, 0) : n + 1])
        what = "it is no width that the step allows"
        if not space.fits(width):
            pairs, factors = (
                "rotary positions turn dims in pairs",
                "two factors would store no less",
            )
            what = space.why if space.normed else pairs if space.rotary else factors
            if width < space.least:
                what = f"a token takes {space.least} experts"
        raise InputError(
            f"space '{space.name}' cannot have width {width}, because {what}. Take {near}, or let `widths` allow it."
        )


def _share(cost: Bill, fraction: float) -> dict[Space, int]:
    """A fraction of every space, rounded down to an allowed width; the narrowest where none is as narrow."""
    return {
        space: allowed[max(bisect_right(allowed, space.share(fraction) + 1e-9) - 1, 0)]
        for space, allowed in cost.widths.items()
    }
