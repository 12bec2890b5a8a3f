"""What selectors of depth share: blocks whose branches may all go, and how many of them must."""

from __future__ import annotations

from collections.abc import Callable

from invariance.core.errors import InputError
from invariance.core.space import Space
from invariance.method.budget import Bill


def candidates(cost: Bill) -> dict[int, list[Space]]:
    """Block → its spaces, of those blocks that may go. Raises InputError where the recipe allows no width 0."""
    found: dict[int, list[Space]] = {}
    for space in cost.widths:
        assert space.block is not None  # a selector of depth is given spaces inside blocks
        found.setdefault(space.block, []).append(space)
    free = {b: spaces for b, spaces in found.items() if all(0 in cost.widths[s] for s in spaces)}
    for block, spaces in found.items():
        for space in spaces:
            if block not in free and cost.widths[space] != (space.dim,):
                raise InputError(
                    f"blocks go as wholes, and space '{space.name}' may not be cut to width 0. Give the step "
                    "`spaces: [heads, mlp]` and `widths: {min: 0}`."
                )
    return free


def check(blocks: int | None) -> None:
    """Raises ValueError for a number of blocks that cannot go."""
    if blocks is not None and blocks < 1:
        raise ValueError("blocks must be at least 1")


def drop(
    cost: Bill,
    blocks: int | None,
    budget: float | None,
    least: Callable[[dict[Space, int], list[int]], int],
) -> dict[Space, int]:
    """Let blocks go one by one, ``least(widths, blocks left)`` first: so many, or until the budget is met.

    One block stays. Raises InputError where so many cannot go.
    """
    free, widths = candidates(cost), cost.whole
    total = len({s.block for s in cost.widths})
    most = min(len(free), total - 1)
    if blocks is not None and blocks > most:
        raise InputError(
            f"{blocks} blocks cannot go: of {total}, {most} may. Let fewer go, or protect fewer."
        )
    for n in range(most):
        if n == blocks or (blocks is None and budget is not None and cost(widths) <= budget):
            break
        block = least(widths, list(free))
        widths |= dict.fromkeys(free.pop(block), 0)
    if blocks is None and budget is not None:
        cost.check(widths)
    return widths
