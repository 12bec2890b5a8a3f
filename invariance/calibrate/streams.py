"""What leaves each stage of the dense model, kept for a walk beside it: on disk beyond a share of memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from torch import Tensor

from ..core.spill import LIMIT, Spill
from .batch import Left


class Streams:
    """A queue of stages; of each what leaves it and what is written there (``Left``), batch by batch."""

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit = limit
        self.clear()

    def clear(self) -> None:
        self.queue: deque[list[Left]] = deque()  # of a stage on disk, an empty list
        self.places: deque[list[tuple[int, int]]] = deque()  # of one in memory, an empty list
        self.spilled = Spill(limit=0)
        self.held = self.count = 0

    def append(self, passed: list[Left]) -> None:
        size = sum(y.nbytes + (0 if given is y else given.nbytes) for y, given in passed)
        fits = self.held + size <= self.limit
        self.held += size if fits else 0
        self.queue.append(passed if fits else [])
        self.places.append([] if fits else [self._put(*left) for left in passed])
        self.device = passed[0][0].device

    def _put(self, y: Tensor, given: Tensor) -> tuple[int, int]:
        first = second = self.count + 1
        self.spilled[first] = y
        if given is not y:
            second = first + 1
            self.spilled[second] = given
        self.count = second
        return first, second

    def popleft(self) -> list[Left]:
        found = self.queue.popleft()
        for first, second in self.places.popleft():
            y = self.spilled.pop(first).to(self.device)
            found.append((y, y if first == second else self.spilled.pop(second).to(self.device)))
        return found

    def __len__(self) -> int:
        return len(self.queue)

    def __iter__(self) -> Iterator[list[Left]]:
        """What is in memory."""
        return iter(self.queue)
