"""How runs are carried out, beside what their recipes say."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Execution:
    """What the runs of a study have in common, and no recipe says."""

    device: str = "cpu"
    trust_remote_code: bool = False
    plugins: tuple[str, ...] = ()
    speed: bool = False  # whether tokens per second are measured
    processes: int = 1  # how many calibrate together
    threads: int | None = None  # of one run; None for what torch takes
    trust_task_code: bool = False  # whether task files of one's own are read
