"""Engines: who runs the jobs. An engine knows jobs only, and any `concurrent.futures.Executor` is one."""
from __future__ import annotations

import ctypes
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from typing import TypeVar

from stream_reshard.errors import ResourceError

Job = TypeVar("Job")
Result = TypeVar("Result")


def run_all(work: Callable[[Job], Result], jobs: Iterable[Job],
            executor: Executor | None = None) -> Iterator[tuple[Job, Result]]:
    """(job, work(job)) as they finish: one after the other in this thread, or on an executor.

    Few jobs are handed out ahead, so that a failure or an interruption stops the run after those under way. Raises
    ResourceError where a worker process died.
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
        for future in running:
            future.cancel()


def die_with_parent() -> None:
    """For the `initializer` of a process pool: workers must not outlive a run that was killed, or they would write into
    the folder of the next one (prctl, PR_SET_PDEATHSIG)."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
