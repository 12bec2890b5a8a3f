"""Models made and run as if nothing else went on: a config may be read while a model is built on meta, or drawn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

REGISTER = (
    nn.Module.register_parameter
)  # which others replace while they build models without weights


@contextmanager
def apart() -> Iterator[None]:
    """On the CPU, in float32 unless told otherwise, without gradients; random numbers of others stay as they are."""
    register, dtype = nn.Module.register_parameter, torch.get_default_dtype()
    nn.Module.register_parameter = REGISTER  # type: ignore[method-assign]
    torch.set_default_dtype(torch.float32)
    try:
        with (
            torch.device("cpu"),
            torch.random.fork_rng([]),
            torch.inference_mode(False),
            torch.no_grad(),
        ):
            yield
    finally:
        torch.set_default_dtype(dtype)
        nn.Module.register_parameter = register  # type: ignore[method-assign]
