"""What a recipe says of calibration: the data on which moments are measured."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ..core.parts import Count, Part, Word
from ..io.sources import Data


class Calibrate(Part):
    """The data on which moments are measured."""

    data: Data  # a hub dataset, a local file, packaged:NAME, self, token ids in an .npy, or a list of them
    sequences: Count | None = None  # how many sequences; null for all there are
    tokens: Count | None = (
        None  # how many tokens a sequence has; null for what the data or the model has
    )
    split: Word = "train"  # which split of the data
    batch: Count = 8  # how many sequences pass at a time
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # what the forward pass computes in
    skip: Annotated[int, Field(ge=0)] = (
        0  # how many first tokens of a sequence pass the model unmeasured
    )
    fisher: Count = 8  # how many of the sequences the output's Fisher is measured on, the first
