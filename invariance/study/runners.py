"""Where the runs of a study are carried out: in this process, in several on this machine, or on a Ray cluster."""

from __future__ import annotations

import multiprocessing
import os
import socket
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Final

from ..compress.execution import Execution
from ..core.errors import InputError
from ..core.progress import Progress, quiet
from .job import Answer, Request, carry_out, carry_out_alone

Runner = Callable[[Sequence[Request]], Iterator[Answer]]
"""Carries requests out and gives the answers as they come, whatever their order."""
DIED = "its process died, perhaps for lack of memory; run fewer at a time (--workers)"


def here(execution: Execution, progress: Progress = quiet) -> Runner:
    """One after the other, in this process."""

    def run(requests: Sequence[Request]) -> Iterator[Answer]:
        for request in requests:
            yield carry_out(request, execution, progress)

    return run


class Several:
    """``workers`` at a time, in processes of their own that keep their model from run to run.

    A process that dies takes all that ran beside it along. Each of those is tried again alone, so that only the one whose
    process dies once more is said to have failed.
    """

    def __init__(self, execution: Execution, workers: int) -> None:
        self.execution, self.workers = execution, workers
        self.pool = self._pool(workers)

    def __call__(self, requests: Sequence[Request]) -> Iterator[Answer]:
        waiting = list(requests)
        while waiting:
            for request in (yield from self._until_broken(waiting)):
                yield self._alone(request)

    def _until_broken(self, waiting: list[Request]) -> Generator[Answer, None, list[Request]]:
        """Answers, until a process dies: then what ran at that time is returned, and what had not begun is still waiting."""
        running: dict[Future[Answer], Request] = {}
        try:
            while waiting or running:
                while (
                    waiting and len(running) < self.workers
                ):  # no more: what waits here survives a broken pool
                    running[self.pool.submit(carry_out_alone, waiting[0], self.execution)] = (
                        waiting[0]
                    )
                    del waiting[0]
                self.pool.submit(
                    int
                )  # the pool looks again at which processes there are: a new one too
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    answer = future.result()
                    del running[future]
                    yield answer
        except BrokenProcessPool:
            self.pool = self._pool(self.workers)
            whole = [f for f in running if f.done() and f.exception() is None]
            lost = [request for future, request in running.items() if future not in whole]
            running.clear()
            for future in whole:
                yield future.result()
            return lost
        finally:
            if running:  # left early: nobody waits for what is still running
                _end(self.pool)
                self.pool = self._pool(self.workers)
        return []

    def _alone(self, request: Request) -> Answer:
        pool = self._pool(1)
        try:
            return pool.submit(carry_out_alone, request, self.execution).result()
        except BrokenProcessPool:
            return Answer(request, reason=DIED)
        finally:
            _end(pool)

    def _pool(self, workers: int) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), end_with_parent)


def end_with_parent() -> None:
    """Let this process end when the one that started it does, even by kill -9: nobody else waits for it."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _end(pool: ProcessPoolExecutor) -> None:
    for process in (pool._processes or {}).values():
        process.terminate()
    pool.shutdown(cancel_futures=True)


#: What a cluster of this machine alone is started with: a run's answer is a few kB, and nobody looks at its dashboard.
LOCAL_CLUSTER: Final[dict[str, Any]] = {
    "object_store_memory": 128 * 2**20,
    "include_dashboard": False,
}


def cluster(execution: Execution, address: str, cpus: float, gpus: float) -> Runner:
    """On a Ray cluster, one process a run, with its resources declared. The cluster's machines need this package."""
    try:
        import ray
    except ImportError:
        raise InputError(
            f"--ray {address}: the package ray is not installed. Run `pip install 'invariance[ray]'`."
        ) from None
    host, _, port = address.rpartition("/")[2].rpartition(":")
    try:
        if host:  # Ray itself waits for minutes, and then ends the process
            socket.create_connection((host, int(port)), timeout=10).close()
        started = LOCAL_CLUSTER if address == "local" else {}
        ray.init(address=address, ignore_reinit_error=True, log_to_driver=False, **started)
    except Exception as e:  # Ray raises many kinds where no cluster answers
        raise InputError(
            f"--ray {address}: {' '.join(str(e).split())[:300]}. Give HOST:PORT of a running cluster, or `local`."
        ) from e
    for flag, kind, asked in (("--cpus", "CPU", cpus), ("--gpus", "GPU", gpus)):
        if asked > (there := ray.cluster_resources().get(kind, 0)):
            raise InputError(
                f"{flag} {asked:g}: the cluster has {there:g} {kind}s, so a run would wait for ever. Ask for less."
            )
    remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_calls=1, max_retries=0)(carry_out_alone)

    def run(requests: Sequence[Request]) -> Iterator[Answer]:
        running = {remote.remote(request, execution): request for request in requests}
        while running:
            (done, *_), _ = ray.wait(list(running), num_returns=1)
            request = running.pop(done)
            try:
                yield ray.get(done)
            except ray.exceptions.RayError as e:
                yield Answer(request, reason=" ".join(str(e).split())[:500])

    return run


def chosen(
    execution: Execution,
    progress: Progress,
    workers: int,
    ray: str | None,
    cpus: float,
    gpus: float,
) -> Runner:
    """The runner that the command line asks for."""
    if ray is not None:
        return cluster(execution, ray, cpus, gpus)
    return Several(execution, workers) if workers > 1 else here(execution, progress)
