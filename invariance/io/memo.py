"""What several runs on one model have in common, computed once: bases, certificates, the dense model's losses."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from ..core.sealed import read_kept, write_kept
from ..model.source import Source
from .models import memory

HELD_BYTES = 4 * 2**30  # of bases, in memory; the oldest go first
T = TypeVar("T")


@dataclass
class Memo:
    """The memory of the runs on ONE model, which nobody changes meanwhile; keys say all that a value hangs on.

    Values that hold tensors are kept within ``limit`` bytes. What ``kept`` gives also goes to ``folder``, where the next
    process finds it.
    """

    folder: Path | None = None
    limit: int = HELD_BYTES
    values: OrderedDict[Hashable, tuple[Any, int]] = field(default_factory=OrderedDict)
    computed: list[Hashable] = field(
        default_factory=list
    )  # the keys of what was computed, not remembered

    def once(
        self, key: Hashable, make: Callable[[], T], size: Callable[[T], int] = lambda value: 0
    ) -> T:
        """The value of a key, made when it is asked for first."""
        if key in self.values:
            self.values.move_to_end(key)
        else:
            self.computed.append(key)
            value = make()
            self.values[key] = value, size(value)
            while len(self.values) > 1 and sum(n for _, n in self.values.values()) > self.limit:
                heavy = next(k for k, (_, n) in self.values.items() if n)
                del self.values[heavy]
                if heavy == key:
                    return value
        found: T = self.values[key][0]
        return found

    def kept(self, key: tuple[str, ...], make: Callable[[], Tensor]) -> Tensor:
        """A tensor, looked up on disk as well; a file that is not as it was written counts as missing."""
        if self.folder is None or key in self.values:
            return self.once(key, make, lambda value: value.nbytes)
        path = self.folder / f"{digest(json.dumps(key))}.safetensors"
        if (found := read_kept(path)) is not None:
            return found["value"]
        value = self.once(key, make, lambda value: value.nbytes)
        write_kept(path, {"value": value})
        return value

    def weights(self, source: Source) -> str:
        """The hash of the model's weights."""
        return self.once(("weights",), source.digest)


def digest(text: str, tensors: Iterable[Tensor] = ()) -> str:
    """A hash of a text and of tensors' bytes."""
    made = hashlib.sha256(text.encode())
    for tensor in tensors:
        made.update(memory(tensor))
    return made.hexdigest()[:32]
