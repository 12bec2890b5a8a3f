"""The layout of a model of real size, from its config alone."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PretrainedConfig

from ..derive import derive
from .check import check
from .describe import describe
from .description import Description
from .experts import Fewer, fewer, stack_sizes, stretch
from .shallow import VOCABULARY, Shallow, shallow
from .source import source
from .weightless import on_meta, refill

PASSES = 4  # at most; more than one only where weights are not reached, each on other weights


def layout_text(config: PretrainedConfig, what: str = "") -> Description:
    """Derived at full width from a few layers and experts on weights that take no memory, and checked.

    Refused where no few layers stand for all. An expert that no token reached is named as unseen.
    """
    full = on_meta(config)
    what = what or config.model_type
    for few in fewer(config, full):
        small = _attempt(few, what)
        if small is not None and not small.flat().unseen:
            made = stretch(small, few.few, few.all)
            check(made, full, what)
            return made
    made = _derived(shallow(config, full), what)
    check(made, full, what)
    return made


def _attempt(few: Fewer, what: str) -> Description | None:
    """None where so few experts are less than a token takes, or not alike."""
    try:
        small = _derived(shallow(few.config), what)
        stretch(small, few.few, few.all)
    except (RuntimeError, ValueError, IndexError):
        return None
    return small


def _derived(model: Shallow, what: str) -> Description:
    routed = bool(stack_sizes(model.model))
    size = (8, 32) if routed else (2, 8)  # so many that one pass reaches every expert
    inputs = [tokens(*size, seed) for seed in range(PASSES)]
    examples = [{"input_ids": ids, "use_cache": False} for ids in inputs]
    derived = derive(model.model, examples, refill)
    found = source(derived, model.model)
    return describe(found, what, model.stands, (model.model, examples[0]))


def tokens(sequences: int, length: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (sequences, length), generator=generator)
