"""What a training is given: the model that is trained, and what is asked of it."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from ..compress.nested import Members
from ..io.basis_file import Basis
from ..recipe.recover import Recover


@dataclass(frozen=True)
class Restructured:
    """A model in the form that slicing leaves, where its stream lies in the dense one's, and its narrower members."""

    model: PreTrainedModel
    basis: Basis | None = None
    nested: Members | None = None


@dataclass(frozen=True)
class Training:
    """The options, where messages say that they stand, and the seed of adapters and of the order of windows."""

    options: Recover
    seed: int = 0
    where: str = "recover"
