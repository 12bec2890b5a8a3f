"""Selector `uniform`: the same share of every space."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float64
from torch import Tensor

from invariance.budget import Bill
from invariance.errors import InputError
from invariance.interfaces import Selector
from invariance.space import Space


@dataclass(frozen=True)
class Uniform(Selector, name="uniform"):
    """Every space keeps the same fraction of its directions (``keep``), or the same number (``width``).

    The number is rounded down to ``multiple_of``. With neither, the recipe's budget decides the fraction: the largest
    that stays within it.
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
        if self.width is not None and self.width < 1:
            raise ValueError("width must be at least 1")
        if self.multiple_of < 1:
            raise ValueError("multiple_of must be at least 1")

    @property
    def needs_budget(self) -> bool:  # type: ignore[override]
        return self.keep is None and self.width is None

    def allocate(
        self, spectra: Mapping[Space, Float64[Tensor, "c d"] | None], cost: Bill, budget: float | None
    ) -> Mapping[Space, int]:
        if self.width is not None:
            for space in spectra:
                if self.width > space.dim:
                    raise InputError(
                        f"width {self.width} is more than the {space.dim} directions of space '{space.name}'. "
                        "Give a smaller width, or a fraction (`keep`)."
                    )
            return {space: self._rounded(cost, space, self.width) for space in spectra}
        if self.keep is not None:
            return {space: self._rounded(cost, space, self.keep * space.dim) for space in spectra}
        assert budget is not None
        steps = max(space.dim for space in spectra)
        for step in range(steps, -1, -1):
            widths = {space: self._rounded(cost, space, step / steps * space.dim) for space in spectra}
            if cost(widths) <= budget:
                break
        return widths

    def _rounded(self, cost: Bill, space: Space, width: float) -> int:
        """The widest allowed multiple that is no wider, the narrowest where a fraction asks for less than that."""
        if self.multiple_of > space.dim:
            raise InputError(
                f"multiple_of {self.multiple_of} is more than the {space.dim} directions of space '{space.name}'. "
                "Give a smaller multiple."
            )
        allowed = [k for k in cost.widths[space] if k % self.multiple_of == 0 or k == space.dim]
        if not allowed or (self.width is not None and min(allowed) > width):
            raise InputError(
                f"space '{space.name}' may have the widths {_several(cost.widths[space])}, and none of them is "
                f"{f'{self.width} or less' if self.width else 'a multiple'} in multiples of {self.multiple_of}. Change "
                "`widths`, or this selector's options."
            )
        return max((k for k in allowed if k <= width + 1e-9), default=min(allowed))


def _several(widths: tuple[int, ...]) -> str:
    return str(widths[0]) if len(widths) == 1 else f"{widths[0]} to {widths[-1]}"
