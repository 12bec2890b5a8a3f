"""Where the runs of a study are carried out: in this process, in several on this machine, or on a Ray cluster."""

from __future__ import annotations

import multiprocessing
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from .errors import InputError
from .study_job import Answer, Request, Setting, carry_out, carry_out_alone
from .walk import Progress, quiet

Runner = Callable[[Sequence[Request]], Iterator[Answer]]
"""Carries requests out and gives the answers as they come, whatever their order."""
DIED = "its process died, perhaps for lack of memory; run fewer at a time (--workers)"


def here(setting: Setting, progress: Progress = quiet) -> Runner:
    """One after the other, in this process."""

    def run(requests: Sequence[Request]) -> Iterator[Answer]:
        for request in requests:
            yield carry_out(request, setting, progress)

    return run


def several(setting: Setting, workers: int) -> Runner:
    """``workers`` at a time, in processes of their own that keep their model from run to run."""

    def run(requests: Sequence[Request]) -> Iterator[Answer]:
        left = list(requests)
        while left:
            left = yield from _until_broken(left, setting, workers)

    return run


def _until_broken(requests: list[Request], setting: Setting, workers: int) -> Any:
    """Answers of one pool; a process that dies takes the pool along, and what had not begun is returned."""
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=spawn)
    waiting, running = list(requests), dict[Future[Answer], Request]()
    try:
        while waiting or running:
            while (
                waiting and len(running) < workers
            ):  # no more than run: what waits here survives a broken pool
                request = waiting.pop(0)
                running[pool.submit(carry_out_alone, request, setting)] = request
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                request = running.pop(future)
                yield future.result()
    except BrokenProcessPool:
        yield Answer(request, reason=DIED)
        for future, other in running.items():
            lost = future.exception() is not None
            yield Answer(other, reason=DIED) if lost else future.result()
    finally:
        for process in (pool._processes or {}).values() if running else ():
            process.terminate()  # left early: nobody waits for what is still running
        pool.shutdown(cancel_futures=True)
    return waiting


def cluster(setting: Setting, address: str, cpus: float, gpus: float) -> Runner:
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
        ray.init(address=address, ignore_reinit_error=True, log_to_driver=False)
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
        running = {remote.remote(request, setting): request for request in requests}
        while running:
            (done, *_), _ = ray.wait(list(running), num_returns=1)
            request = running.pop(done)
            try:
                yield ray.get(done)
            except ray.exceptions.RayError as e:
                yield Answer(request, reason=" ".join(str(e).split())[:500])

    return run


def chosen(
    setting: Setting, progress: Progress, workers: int, ray: str | None, cpus: float, gpus: float
) -> Runner:
    """The runner that the command line asks for."""
    if ray is not None:
        return cluster(setting, ray, cpus, gpus)
    return several(setting, workers) if workers > 1 else here(setting, progress)
