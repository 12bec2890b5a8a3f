"""Where a sliced model's residual stream lies in the dense model's, and the file beside a checkpoint that says so."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..core.errors import InputError
from ..core.files import beside, replacing, write_tensors
from ..core.kind import Kind, space_name
from ..core.space import Space
from ..model.layout import Layout
from .join import join
from .memo import digest

NAME = "basis.safetensors"


@dataclass(frozen=True)
class Basis:
    """Where a student's residual stream lies, seen from the dense model's canonical form.

    ``encode`` (d, k) by the student's point of the stream, left out where the stream did not change; ``points`` names
    the dense model's point for each of the student's, which may have lost blocks; ``folded`` says of which canonical
    form the encodes speak; ``depth`` is the number of the dense model's blocks.
    """

    encode: Mapping[str, Float[Tensor, "d k"]]
    points: Mapping[str, str]
    folded: bool
    depth: int

    @classmethod
    def unchanged(cls, layout: Layout) -> Basis:
        """That of a model whose stream is the dense model's own."""
        return cls.of(layout, {})

    @classmethod
    def of(cls, layout: Layout, encode: Mapping[str, Tensor]) -> Basis:
        """That of a model whose stream was changed by ``encode``; ``layout`` is that of its canonical form."""
        return cls(encode, {p: p for p in layout.points}, layout.folded, layout.edges[-1].block + 1)

    def write(self, folder: Path, blocks: Sequence[int]) -> None:
        """Beside a checkpoint that has these blocks of the dense model; nothing where all of that is as it was."""
        if not self.encode and list(blocks) == list(range(self.depth)):
            return
        first = dict[str, str]()  # points that share one basis share one tensor
        shared = dict[str, str]()
        with TemporaryDirectory(dir=folder) as scratch:
            for point, E in self.encode.items():
                shared[point] = first.setdefault(digest("", [E]), point)
                if shared[point] == point:
                    write_tensors(Path(scratch) / point, {point: E.float().cpu()})
            told = {
                "points": json.dumps(shared),
                "blocks": json.dumps(list(blocks)),
                "depth": json.dumps(self.depth),
                "folded": json.dumps(self.folded),
            }
            with replacing(folder / NAME) as made:
                join([Path(scratch) / point for point in first.values()], made, told)


def read_basis(model: str, layout: Layout) -> Basis:
    """The basis of a checkpoint, from the file beside it; where there is none, the dense model's own.

    ``layout`` is that of the checkpoint. Raises InputError where the file is needed and cannot be read.
    """
    path = beside(model, NAME)
    if path is None:
        if layout.folded:
            raise InputError(
                f"{model}: its residual stream has a basis of its own, and there is no {NAME} in this folder, nor above it where "
                "that is called model/, that says which. Copy it from where the checkpoint was made, or train without `hidden` "
                "and `local`."
            )
        return Basis.unchanged(layout)
    try:
        with safe_open(path, "pt") as file:
            told = {key: json.loads(value) for key, value in file.metadata().items()}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        blocks = [*told["blocks"], told["depth"]]
        dense = {p: _renamed(layout.spaces[p], blocks) for p in layout.points}
        encode = {
            ours: tensors[told["points"][p]] for ours, p in dense.items() if p in told["points"]
        }
        return Basis(encode, dense, bool(told["folded"]), int(told["depth"]))
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, AttributeError) as e:
        raise InputError(
            f"{path}: cannot be read ({type(e).__name__}: {e}). Copy it again from where it was made."
        ) from e


def _renamed(point: Space, blocks: Sequence[int]) -> str:
    """A point of the stream by the number that its block had in the dense model."""
    assert point.block is not None
    return space_name(Kind.RESIDUAL, blocks[point.block], point.stage)
