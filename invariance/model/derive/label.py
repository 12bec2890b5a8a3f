"""What is known of a tensor: which coordinate each of its elements belongs to."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

Terms = tuple[tuple[Tensor, Tensor], ...]  # a sum of constants times coordinates: (ids, constants)


@dataclass(frozen=True, eq=False)
class Label:
    """The type of one tensor.

    fields: the coordinate id of every element, one array for each space that the tensor carries, of the tensor's shape.
    terms: the tensor as a sum of constants times coordinates (rotary positions), where it is not just ``fields[0]``.
    squared: the elements are squares of what the fields say, and what will be done with them is not known yet.
    parameter: (name, constant added to it) while the tensor is still a weight: it may be a gain.
    blank: the tensor was made empty; its ids wait for what is written to it.
    parts: real and imaginary part of a complex tensor, each as terms.
    """

    fields: tuple[Tensor, ...]
    terms: Terms | None = None
    squared: bool = False
    parameter: tuple[str, float] | None = None
    blank: bool = False
    parts: tuple[Terms, Terms] | None = None
