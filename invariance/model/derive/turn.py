"""An element of all groups at once, applied to weights: which rows of which weight each block changes, found once."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from .analysis import Derived
from .arrays import rows_of
from .block import Axis, Block, Kind
from .elements import Element


@dataclass(frozen=True, eq=False)
class Step:
    """What one block does to one axis.

    rows: positions along the axis's line. For a matrix or permutation: runs × classes, each run changed alike, the
    inverse transpose where ``variance`` is -1. For a swap: where each position takes its new value from.
    """

    block: Block
    axis: Axis
    rows: Tensor
    variance: int = 1


@dataclass(frozen=True, eq=False)
class Plan:
    """All steps of a derivation; ``broken`` names blocks whose steps do not fit together, and why."""

    derived: Derived
    steps: tuple[Step, ...]
    broken: Mapping[Block, str] = field(default_factory=dict)

    @classmethod
    def of(cls, derived: Derived) -> Plan:
        steps: list[Step] = []
        broken: dict[Block, str] = {}
        lines = {axis: derived.line(axis) for axis in derived.axes}
        for block in derived.blocks:
            try:
                find = swap_steps if block.kind is Kind.NODES else run_steps
                steps += find(derived, block, lines)
            except ValueError as error:
                broken[block] = str(error)
        return cls(derived, tuple(steps), broken)


def carried_by(derived: Derived, block: Block) -> Iterator[Axis]:
    """The block's axes, in the order in which the pass met them."""
    return (axis for axis in derived.axes if axis in block.where)


def run_steps(derived: Derived, block: Block, lines: Mapping[Axis, list[int]]) -> Iterator[Step]:
    """Runs: the r-th place of every class along an axis, once for each variance. Folded gains stay ones."""
    signed = block.kind in (Kind.GL, Kind.C)
    place = {c: i for i, c in enumerate(block.classes)}
    for axis in carried_by(derived, block):
        if axis[0] in derived.gains and block.kind is not Kind.PERM:
            continue
        found: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
        for q, a in enumerate(lines[axis]):
            c = derived.ids.root(a)
            if c in place:
                found[derived.variance(block, a) if signed else 1][place[c]].append(q)
        for variance, positions in found.items():
            counts = {len(positions[i]) for i in range(len(place))}
            if len(counts) != 1:
                raise ValueError(f"{axis[0]} carries only a part of its coordinates")
            rows = torch.tensor([positions[i] for i in range(len(place))]).T
            yield Step(block, axis, rows.contiguous(), variance)


def swap_steps(derived: Derived, block: Block, lines: Mapping[Axis, list[int]]) -> Iterator[Step]:
    """Every id takes the place of its image; where whole slices of a stack move, its other axes move along."""
    for swap in block.maps:
        whole: set[str] = set()
        for axis in carried_by(derived, block):
            ids = lines[axis]
            if axis[0] in whole or not any(a in swap for a in ids):
                continue
            at = {a: q for q, a in enumerate(ids)}
            images = [swap.get(a, a) for a in ids]
            if any(a not in at for a in images):
                raise ValueError(
                    f"{axis[0]} holds one of two that change places, and not the other"
                )
            if derived.is_stack_place(ids[0]):
                whole.add(axis[0])
            yield Step(block, axis, torch.tensor([at[a] for a in images]))


def turn(
    weights: Mapping[str, Tensor],
    plan: Plan,
    element: Element,
    keep: Callable[[Step], bool] = lambda step: True,
    scaled: Callable[[Axis], bool] = lambda axis: True,
) -> None:
    """In place. ``keep`` and ``scaled`` leave steps and axes out: for controls."""
    for step in plan.steps:
        if not keep(step):
            continue
        if step.block in element.matrices or step.block in element.orders:
            change_rows(weights[step.axis[0]], plan.derived.axes[step.axis], step, element)
        elif step.block in element.swapped:
            rows, put = rows_of(weights[step.axis[0]], plan.derived.axes[step.axis])
            put(rows[step.rows])
    for axis, factors in scale_factors(plan.derived, element).items():
        if scaled(axis):
            rows, put = rows_of(weights[axis[0]], plan.derived.axes[axis])
            put(rows * factors.to(rows.dtype)[:, None])


def change_rows(weight: Tensor, field: Tensor, step: Step, element: Element) -> None:
    rows, put = rows_of(weight, field)
    rows = rows.clone()
    runs = rows[step.rows]
    if step.block in element.orders:
        rows[step.rows] = runs[:, torch.from_numpy(element.orders[step.block])]
    else:
        A = element.matrices[step.block]
        A = A.T if step.variance == 1 else np.linalg.inv(A)
        rows[step.rows] = torch.einsum(
            "ij,rj...->ri...", torch.from_numpy(A.copy()).to(rows.dtype), runs
        )
    put(rows)


def scale_factors(derived: Derived, element: Element) -> Mapping[Axis, Tensor]:
    """Per axis that is scaled, every position's scale and sign."""
    out = {}
    for axis, roots in derived.scale_roots.items() if element.scales else ():
        drawn = [element.scales.get(r, (0.0, 0)) for r in roots.unique]
        if any(x != (0.0, 0) for x in drawn):
            logs = np.array([x[0] for x in drawn])[roots.at] * roots.power
            signs = np.array([1 - 2 * x[1] for x in drawn])[roots.at]
            out[axis] = torch.from_numpy(np.exp(logs) * signs)
    return out


def sizes(blocks: tuple[Block, ...]) -> Counter[tuple[str, Kind, int]]:
    """How many blocks there are of a stem, a kind and a size."""
    return Counter((b.stem, b.kind, len(b.classes)) for b in blocks)
