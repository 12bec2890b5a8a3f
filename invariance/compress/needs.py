"""How much memory and disk a run takes at most, before it begins: from the plan alone."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import psutil
import torch

from ..calibrate.moments import Key
from ..core.errors import InputError
from ..core.spill import LIMIT
from ..model.axes import Edge
from .plan import Plan

IMPORTS = 500_000_000  # what Python, torch and transformers take
LOGITS = 512 * 20  # bytes a word of the vocabulary, where labels are drawn for so many tokens
FITS = 3  # matrices as large as a space's moment that a method makes at a time
WIDE = 8  # bytes of a float64
SHOWN = 2**30  # bytes of weights up to which a run shows texts and speeds that no recipe asks for
WINDOW = 256  # tokens whose logits are in memory when a model shows its speed, in float32 and as they come
COPIES = 4  # of a model in float32 that recovery, quantisation and measured selectors hold


@dataclass(frozen=True)
class Needs:
    """Bytes in memory at the worst moment, on disk, and why all of the model must be in memory, if so."""

    memory: int
    disk: int
    whole: str | None = None

    def check(self, where: str) -> None:
        """Raises InputError where there is less memory."""
        there = psutil.virtual_memory().available
        if self.memory > there:
            why = "" if self.whole is None else f", since {self.whole} needs all of the model"
            raise InputError(
                f"{where}: this run takes up to {self.memory / 1e9:.1f} GB of memory{why}, and "
                f"{there / 1e9:.1f} GB are free. Use fewer tokens, or a machine with more."
            )


def needs(chart: Plan, tokens: int, stored: torch.dtype) -> Needs:
    """What a plan takes on so many calibration tokens, of a model stored in a dtype."""
    layout = chart.layout
    sizes = {n: prod(shape) for n, shape in chart.dense.shapes.items()}
    stage = max(_stage(chart, edge) for edge in layout.edges)
    width = layout.spaces[layout.points[0]].dim
    hidden = min(tokens * width * 4 * (2 if chart.follows else 1), 10 * LIMIT)
    of_space = {key: _moment(chart, key) for key in _keys(chart)}
    of_stage = max((_measured(chart, edge, of_space) for edge in layout.edges), default=0)
    largest = max(of_space.values(), default=0)
    table = sizes[f"{layout.architecture.embed[0]}.weight"] * stored.itemsize
    vocabulary = chart.dense.shapes[f"{layout.architecture.embed[0]}.weight"][0]
    phases = [
        stage * stored.itemsize + hidden + of_stage,  # measure
        stage * WIDE + of_stage + FITS * largest,  # fit and cut
        2 * stage * WIDE,  # verify
        2 * stage * 4 + hidden + vocabulary * LOGITS,  # gradients
        table + 2**26,  # write tables and the head
    ]
    if chart.follows:
        phases.append(stage * WIDE + 4 * _features(chart) ** 2 * WIDE + hidden)
    widths, dense = chart.allocate(None), sum(sizes.values())
    numbers = dense if widths is None else chart.parameters(widths).total
    if dense * stored.itemsize <= SHOWN:
        phases.append(max(dense, numbers) * stored.itemsize + 2 * 4 * WINDOW * vocabulary)
    memory, why = IMPORTS + max(phases), _whole(chart)
    if why is not None:
        memory += COPIES * 4 * dense
    return Needs(memory, numbers * stored.itemsize + sum(of_space.values()), why)


def _whole(chart: Plan) -> str | None:
    recipe = chart.recipe
    asked = {
        "`recover`": recipe.recover is not None,
        "`vocabulary`": recipe.vocabulary is not None,
        "`quantize`": recipe.quantize is not None,
        "`nested`": recipe.nested is not None,
        "a selector that measures losses": chart.measures,
        "a method that sees the model": bool(chart.joined),
    }
    return next((name for name, needed in asked.items() if needed), None)


def _keys(chart: Plan) -> list[Key]:
    return [(name, s) for name, found in chart.of_dense().items() for s in found]


def _moment(chart: Plan, key: Key) -> int:
    space = chart.layout.spaces[key[0]]
    return WIDE * space.copies * space.seen**2


def _stage(chart: Plan, edge: Edge) -> int:
    shapes = chart.layout.shapes
    return sum(prod(shape) for n, shape in shapes.items() if n.startswith(f"{edge.stage}."))


def _measured(chart: Plan, edge: Edge, of_space: dict[Key, int]) -> int:
    """The moments of one stage."""
    here = {edge.source}
    for name, axes in chart.layout.axes.items():
        if name.startswith(f"{edge.stage}."):
            here |= {part.space for axis in axes if axis is not None for part in axis.spaces}
    return sum(size for key, size in of_space.items() if key[0] in here - {edge.target})


def _features(chart: Plan) -> int:
    """The most that the writers of a stage read together."""
    found = [0]
    for edge in chart.layout.edges:
        names = [n for n in chart.layout.shapes if n.startswith(f"{edge.stage}.")]
        written = [n for n in names if n.endswith((".out.weight", ".down.weight"))]
        found.append(sum(chart.layout.shapes[n][1] for n in written))
    return max(found)
