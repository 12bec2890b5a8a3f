"""Units, which share one basis, and demands, which share one width: what a plan is made of."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, lcm

import torch
from jaxtyping import Float64
from torch import Tensor

from ..calibrate.moments import Moments
from ..calibrate.statistic import Statistic
from ..core.errors import InputError
from ..core.space import Space
from ..method.interfaces import Joint, Rotator, Selector, Slicer
from ..recipe.budget import Constraints


@dataclass(frozen=True)
class Unit:
    """Spaces that share one basis and one width: a segment of the residual stream, one space alone, or several side by side."""

    members: tuple[str, ...]
    blocks: tuple[int, ...]  # of each member the block; of the stream's last point the last one
    space: Space  # the first member, for all
    step: int
    rotate: Rotator | Joint
    select: Selector | None
    slice: Slicer | None
    rank: int | None = (
        None  # of shortcuts between it and others of its step, where they are of low rank
    )

    @property
    def side_by_side(self) -> bool:
        """Whether its members lie beside each other, not behind: their copies are fitted as those of one space."""
        return len(self.members) > 1 and self.space.kind != "residual"

    @property
    def fitted(self) -> Space:
        """The space that the rotator sees."""
        return (
            replace(self.space, copies=len(self.members) * self.space.copies)
            if self.side_by_side
            else self.space
        )

    def together(self, moments: Moments) -> Moments:
        """Those of all members, under the name of the first."""
        return (moments.beside if self.side_by_side else moments.pooled)(
            self.members, self.space.name
        )

    @property
    def needs(self) -> frozenset[Statistic]:
        return frozenset(s.on(self.space) for s in self.rotate.needs) | self.cut_needs

    @property
    def cut_needs(self) -> frozenset[Statistic]:
        """What is needed once there is a basis."""
        asked = self.slice.needs if self.slice else frozenset()
        if self.rank is not None:
            asked |= {Statistic.SEEN}  # says which directions a shortcut should not leave out
        return frozenset(s.on(self.space) for s in asked)


Widths = Mapping[str, int]  # space name → width kept; spaces that no step names are left out
Spectra = Mapping[str, Float64[Tensor, "c d"]]  # a unit's first member → its energies
Loss = Callable[[Widths], float]


@dataclass(frozen=True)
class Demand:
    """Units that get one width between them, and what the steps that they come from say of their widths."""

    units: tuple[Unit, ...]
    constraints: tuple[Constraints, ...]

    @property
    def space(self) -> Space:
        """The first unit's, for all."""
        return self.units[0].space

    @property
    def select(self) -> Selector | None:
        return self.units[0].select

    @property
    def members(self) -> list[str]:
        return [m for unit in self.units for m in unit.members]

    @property
    def blocks(self) -> list[int]:
        """Of each member the block."""
        return [b for unit in self.units for b in unit.blocks]

    def without(self, gone: Container[str]) -> Demand | None:
        """What is left where some spaces go with their branches; None where all do."""
        if not any(m in gone for m in self.members):
            return self
        left = tuple(u for u in self.units if not all(m in gone for m in u.members))
        return replace(self, units=left) if left else None

    def pooled(self, spectra: Spectra) -> Float64[Tensor, "c d"]:
        """The energies of all units together, direction by direction."""
        return (
            torch.stack([spectra[u.space.name].sum(0, keepdim=True) for u in self.units]).sum(0)
            if len(self.units) > 1
            else spectra[self.space.name]
        )

    def mean(self, influence: Sequence[float]) -> float:
        """The mean influence of the blocks that its spaces lie in."""
        found = [influence[b] for b in self.blocks]
        return sum(found) / len(found)

    def allowed(self, blocks: int, vanishing: Container[str]) -> tuple[int, ...]:
        """The widths that a selector may choose, ascending; 0 for ``vanishing`` spaces alone."""
        d = self.space.dim
        if other := next((u.space for u in self.units if u.space.dim != d), None):
            raise InputError(
                f"spaces '{self.space.name}' and '{other.name}' have {d} and {other.dim} directions, so they cannot get "
                "the `same` width. Give them steps of their own."
            )
        if self.protected(blocks):
            return (d,)
        each = [set(self._allowed(c, vanishing)) for c in self.constraints]
        if not (found := set.intersection(*each)):
            raise InputError(
                f"space '{self.space.name}' gets one width with spaces of another step, and no width is allowed by the `widths` "
                "of both. Widen them."
            )
        return tuple(sorted(found))

    def _allowed(self, c: Constraints, vanishing: Container[str]) -> set[int]:
        d = self.space.dim
        multiple = lcm(c.multiple_of, self.select.multiple_of if self.select else 1)
        if multiple > d:
            raise InputError(
                f"multiple_of {multiple} is more than the {d} directions of space '{self.space.name}'. Give a smaller "
                "multiple, or give such spaces a step of their own."
            )
        share = self.space.share
        low = ceil(share(c.min) - 1e-9) if isinstance(c.min, float) else min(c.min, d)
        high = int(share(c.max) + 1e-9) if isinstance(c.max, float) else min(c.max, d)
        if c.min == 0 and any(m not in vanishing for m in self.members):
            raise InputError(
                f"no branch vanishes with space '{self.space.name}', so its width cannot be 0. Use `min: 1`, or limit "
                "the step to `mlp` and `heads`."
            )
        found = {k for k in range(0, d + 1, multiple) if low <= k <= high and (k or c.min == 0)}
        found = {k for k in found if all(u.space.fits(k) for u in self.units)}
        if high == d and self.space.kind == "edge":
            found |= {d}  # the matrix itself, which has no rank to be a multiple
        if low > high:
            raise InputError(
                f"`min` asks for {low} of the {d} directions of space '{self.space.name}' at least, and `max` for {high} at most. "
                "A whole number counts directions, a fraction is a share: all of them are 1.0."
            )
        if not found:
            whole = " that keeps whole frequency pairs" if self.space.rotary else ""
            raise InputError(
                f"no width of space '{self.space.name}' (dim {d}){whole} is a multiple of {multiple} between "
                f"{low} and {high}. Widen `widths`."
            )
        return found

    def protected(self, blocks: int) -> bool:
        """Whether the recipe keeps its spaces whole. Raises InputError where that holds for some of them only."""
        found = [
            m
            for m, b in zip(self.members, self.blocks, strict=True)
            if any(_protected(b, blocks, c) for c in self.constraints)
        ]
        if found and len(found) < len(self.members):
            raise InputError(
                f"`protect` keeps '{found[0]}' whole, and it gets one width with spaces that it does not protect. "
                "Protect all of them or none, or let each have its own width."
            )
        return bool(found)

    def check(self, k: object, most: int | None = None) -> None:
        """Raises InputError for a width that a selector may not give; ``most`` is that of the next wider member."""
        space, select = self.space, self.select
        assert select is not None
        least = 0 if all(c.min == 0 for c in self.constraints) else 1
        if not isinstance(k, int) or not least <= k <= space.dim:
            raise InputError(
                f"selector '{select.name}' gave space '{space.name}' the width {k}; it must be a whole number from "
                f"{least} to {space.dim}."
            )
        if most is not None and k > most:
            raise InputError(
                f"selector '{select.name}' gave space '{space.name}' the width {k} in a narrower member, where the wider "
                f"one has {most}. A selector must keep to `cost.widths`; use another one, or remove `nested`."
            )
        if not space.fits(k):
            if k < space.least:
                raise InputError(
                    f"selector '{select.name}' gave space '{space.name}' the width {k}, and a token takes {space.least} experts."
                )
            if space.even is not None:
                raise InputError(
                    f"selector '{select.name}' gave space '{space.name}' the width {k}, at which two factors store no less "
                    f"than the matrix; it must be below {space.even:.1f}, or {space.dim}, the whole."
                )
            raise InputError(
                f"selector '{select.name}' gave space '{space.name}' the width {k}, which would split one of the pairs "
                f"that rotary positions turn, or cut what they spare; {space.spared} plus an even number would not."
            )


def _protected(block: int, blocks: int, constraints: Constraints) -> bool:
    protect = constraints.protect
    return block < protect.first or block >= blocks - protect.last
