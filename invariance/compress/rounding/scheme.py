"""Which weights are rounded, to how many bits, and how many bytes they take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import gcd

import torch
from torch import nn
from transformers import PreTrainedModel

from ...core.errors import InputError
from ...method.rounding import Grid, grid_bits
from ...model.families import architecture
from ...model.layout import Layout
from ...recipe.quantize import Quantize


def check_groups(layout: Layout, widths: Mapping[str, int], asked: Quantize, where: str) -> None:
    """Raises InputError where rows of a weight fall into no whole number of groups."""
    rows = dict(_rows(layout, widths, asked))
    odd = next((name for name, length in rows.items() if length % asked.group), None)
    if odd is None:
        return
    cut = f", or give the steps `widths: {{multiple_of: {asked.group}}}`" if widths else ""
    raise InputError(
        f"{where}: rows of {odd} have {rows[odd]} weights, which groups of {asked.group} do not divide. Take a group that "
        f"divides {gcd(*rows.values())}, as all rows do{cut}."
    )


def _rows(layout: Layout, widths: Mapping[str, int], asked: Quantize) -> Iterator[tuple[str, int]]:
    """The weights that would be rounded at these widths, each with the length of its rows."""
    gone, arch = layout.gone(widths), layout.architecture
    tables = (
        {f"{arch.embed[0]}.weight", f"{arch.head}.weight"} if asked.tables is not None else set()
    )
    for name, axes in layout.axes.items():
        rounded = name in tables or (layout.parts[name] == "blocks" and len(axes) == 2)
        if rounded and axes[-1] is not None and not name.startswith(gone):
            yield name, layout.length(axes[-1], widths)


def scheme(model: PreTrainedModel, asked: Quantize) -> dict[str, int]:
    """The modules whose weights are rounded, each with its bits: linear layers of blocks, the table of the tokens and, where
    it is another, that of the head.

    All else keeps its dtype: norms, biases, positions, shortcuts, and the k×k matrix before a tied head, whose diagonal
    stands out.
    """
    blocks = set(model.get_submodule(architecture(model.config).blocks).modules())
    tables = table_modules(model)
    found = {
        path: asked.tables if module in tables else asked.bits
        for path, module in model.named_modules()
        if module in tables or (isinstance(module, nn.Linear) and module in blocks)
    }
    return {path: bits for path, bits in found.items() if bits is not None}


def packed_bytes(model: PreTrainedModel, asked: Quantize | None, stored: torch.dtype) -> int:
    """What a model takes where its weights are packed tightly: what its rounding says, and all that is not rounded in the
    dtype of the checkpoint. Tables are rounded to nearest. A tied tensor counts once."""
    bits = {} if asked is None else scheme(model, asked)
    of = {id(model.get_submodule(path).weight): path for path in bits}
    tables = table_modules(model)
    total = 0
    for parameter in model.parameters():
        path = of.get(id(parameter))
        if path is None or asked is None:
            total += parameter.numel() * stored.itemsize
            continue
        n, m = parameter.shape
        grid = Grid(bits[path], asked.group)
        whole = model.get_submodule(path) in tables
        found = (
            grid_bits(n, m, grid)
            if whole
            else asked.round.stored_bits(n, m, grid, 8 * stored.itemsize)
        )
        total += -(-found // 8)
    return total


def table_modules(model: PreTrainedModel) -> set[nn.Module]:
    """The table of the tokens and, where it is another, that of the head."""
    embed, head = model.get_input_embeddings(), model.get_output_embeddings()
    return {embed} if head.weight is embed.weight else {embed, head}
