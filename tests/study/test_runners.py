"""Processes that carry runs out: kept from call to call, one that dies fails alone, and none outlives who started it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import psutil
import pytest

from invariance.compress.execution import Execution
from invariance.study import runners
from invariance.study.job import Answer, Request
from invariance.study.runners import DIED, Several

WAITING = """
import os, sys, time
from invariance.compress.execution import Execution
from invariance.study import runners
from invariance.study.job import Request

def work(request, execution):
    print(os.getpid(), flush=True)
    time.sleep(600)

if __name__ == "__main__":
    runners.carry_out_alone = work
    list(runners.Several(Execution(), 2)([Request("a", ()), Request("b", ())]))
"""


def work(request: Request, execution: Execution) -> Answer:
    started = Path(os.environ["STARTED"])
    if request.name.startswith("dies"):
        while not started.exists():
            time.sleep(0.01)
        os._exit(3)
    if request.name == "beside" and not started.exists():
        started.touch()
        time.sleep(60)  # until the process beside it dies; then it is tried again
        return Answer(request, reason="nobody noticed")
    time.sleep(0.2 if request.name == "slow" else 0)
    return Answer(request, {"process": os.getpid()})


def asked(*names: str) -> list[Request]:
    return [Request(name, ()) for name in names]


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Several:
    monkeypatch.setenv("STARTED", str(tmp_path / "started"))
    monkeypatch.setattr(runners, "carry_out_alone", work)
    return Several(Execution(), workers=2)


@pytest.mark.parametrize("late", [False, True])
def test_a_process_that_dies_fails_alone_and_all_others_give_their_answers(
    two: Several, late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = ProcessPoolExecutor._adjust_process_count

    def later(pool: ProcessPoolExecutor) -> None:
        while pool._processes and not Path(os.environ["STARTED"]).exists():
            time.sleep(0.01)  # by when the pool watches the one process that there is, and sleeps
        begin(pool)

    if late:
        monkeypatch.setattr(ProcessPoolExecutor, "_adjust_process_count", later)
    names = ("beside", "dies") if late else ("beside", "dies", "one", "two", "dies too", "three")
    answers = {answer.request.name: answer for answer in two(asked(*names))}
    assert answers.keys() == set(names)
    failed = {name: answer.reason for name, answer in answers.items() if answer.report is None}
    assert failed == {name: DIED for name in names if name.startswith("dies")}


def test_processes_are_kept_from_one_call_to_the_next(two: Several) -> None:
    found = {a.report["process"] for _ in range(3) for a in two(asked("slow", "slow")) if a.report}
    assert os.getpid() not in found and found <= set(two.pool._processes) and len(found) <= 2


def test_who_leaves_early_leaves_nothing_running(two: Several) -> None:
    answers = two(asked("one", *["slow"] * 8))
    assert next(answers).report
    started = [psutil.Process(p.pid) for p in two.pool._processes.values()]
    answers.close()  # type: ignore[attr-defined]
    assert started and not psutil.wait_procs(started, timeout=30)[1]
    assert [a.request.name for a in two(asked("again"))] == ["again"]


def test_no_process_outlives_who_started_it(tmp_path: Path) -> None:
    (tmp_path / "waiting.py").write_text(WAITING)
    command = [sys.executable, str(tmp_path / "waiting.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        children = [psutil.Process(int(parent.stdout.readline())) for _ in range(2)]
        assert all(child.is_running() for child in children)
        parent.kill()
    assert not psutil.wait_procs(children, timeout=30)[1]
