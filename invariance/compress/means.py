"""What a run works with beside model and plan: where moments are kept, what earlier runs computed, who listens."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from ..core.progress import Progress, quiet
from ..io.memo import Memo
from ..model.axes import Edge
from ..model.working import Working
from .demand import Widths


class Receiver(Protocol):
    """Takes the parts of a cut model as they come about; they are not kept."""

    def begin(self, parts: Working, widths: Widths) -> None: ...
    def stage(self, parts: Working, edge: Edge) -> None: ...
    def end(self, parts: Working) -> None: ...


@dataclass(frozen=True)
class Means:
    """What a run works with beside model and plan: where moments are kept, what earlier runs computed, who listens."""

    store: Path | None = None
    memo: Memo = field(default_factory=Memo)
    progress: Progress = quiet
    receiver: Receiver | None = None
    device: str | torch.device | None = None  # None: where a model in memory is, else the CPU
