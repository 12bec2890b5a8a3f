"""Forward passes in float64, whatever precision a model's own code asks for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

_LOW = {torch.float32, torch.bfloat16, torch.float16}


def raised(value: Any) -> Any:
    """float64 where a lower precision is named."""
    return torch.float64 if isinstance(value, torch.dtype) and value in _LOW else value


def in_double(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The op, with every request for a lower precision answered in float64."""
    return func(*map(raised, args), **{k: raised(v) for k, v in kwargs.items()})


class Double(TorchDispatchMode):
    """Norms, softmax and routers compute in float64 too, although their code asks for float32."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return in_double(func, args, kwargs or {})


@contextmanager
def double() -> Iterator[None]:
    """No gradients, float64 as the default, attention written out in plain ops."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.set_default_dtype(before)
