"""One call of an op, as a rule sees it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..label import Label
from ..record import Record


@dataclass(frozen=True, eq=False)
class Call:
    """op: the name without the underscore of in-place ops; tensors: all tensors among the arguments.

    For an op that works in place, ``before`` holds the arguments' labels before it ran: ``args[0]`` has the new values
    already, and is ``out`` as well.
    """

    op: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    before: tuple[Label | None, ...] | None
    tensors: tuple[Tensor, ...]

    def at(self, i: int, name: str = "", default: Any = None) -> Any:
        """The i-th argument, or the keyword, or the default."""
        return self.args[i] if len(self.args) > i else self.kwargs.get(name, default)

    def label(self, r: Record, i: int) -> Label | None:
        """The label of the i-th argument, as it was before the op ran."""
        if self.before is not None:
            return self.before[i] if i < len(self.before) else None
        return r.get(self.at(i))

    @property
    def outs(self) -> list[Any]:
        return list(self.out) if isinstance(self.out, (tuple, list)) else [self.out]


Rule = Callable[[Record, Call], None]
