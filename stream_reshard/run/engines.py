"""Engines: who runs the jobs. An engine knows jobs only, and any `concurrent.futures.Executor` is one."""
from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from typing import TypeVar

from stream_reshard.errors import ResourceError
from stream_reshard.machine.stop import Stop

Job = TypeVar("Job")
Result = TypeVar("Result")


def run_all(work: Callable[[Job], Result], jobs: Iterable[Job], stop: Stop, executor: Executor | None = None,
            late: Callable[[Result], None] = lambda result: None) -> Generator[tuple[Job, Result], None, None]:
    """(job, work(job)) as they finish: one after the other in this thread, or on an executor.

    Few jobs are handed out ahead. Where one fails, or the caller closes the generator, `stop` is requested of those
    under way; `late` gets the results of those that come to their end all the same. Raises ResourceError where a worker
    process died.
    """
    if executor is None:
        yield from ((job, work(job)) for job in jobs)
        return
    waiting = iter(jobs)
    running: dict[Future[Result], Job] = {}
    try:
        while True:
            for job in waiting:
                running[executor.submit(work, job)] = job
                if len(running) >= 2 * getattr(executor, "_max_workers", 8):
                    break
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()
    except BrokenExecutor as error:
        raise ResourceError("a worker process died (killed, or out of memory?); run the same command again to go on"
                            ) from error
    finally:
        if running:
            stop.request()
        for future in running:
            future.cancel()
        for future in running:
            if not future.cancelled() and future.exception() is None:
                late(future.result())


def die_with_parent() -> None:
    """For the `initializer` of a process pool: workers must not outlive a run that was killed, or they would write into
    the folder of the next one (prctl, PR_SET_PDEATHSIG). Nor does one that was still starting then."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None and not _lives(parent.pid):
        os.kill(os.getpid(), signal.SIGKILL)


def _lives(pid: int) -> bool:
    import psutil
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False
