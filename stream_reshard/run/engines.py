"""Engines: who runs the jobs. An engine takes a job and returns a future: the lanes of this process, or any
`concurrent.futures.Executor`."""
from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, wait
from itertools import islice
from typing import TypeVar

from stream_reshard.errors import ResourceError
from stream_reshard.machine.stop import Stop

Job = TypeVar("Job")
Result = TypeVar("Result")


def run_all(submit: Callable[[Job], Future[Result]], jobs: Iterable[Job], stop: Stop, num_ahead: int,
            late: Callable[[Result], None] = lambda result: None,
            again: tuple[type[Exception], ...] = ()) -> Generator[tuple[Job, Result], None, None]:
    """(job, result) as jobs finish. `submit` hands a job out; at most `num_ahead` are handed out at once.

    A job that raises one of `again` is handed out once more. Where one fails, or the caller closes the generator,
    `stop` is requested of those under way; `late` gets the results of those that come to their end all the same. Raises
    ResourceError where a worker process died.
    """
    waiting = ((job, again) for job in jobs)
    running: dict[Future[Result], tuple[Job, tuple[type[Exception], ...]]] = {}
    try:
        while True:
            for job, retried in islice(waiting, num_ahead - len(running)):
                running[submit(job)] = job, retried
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job, retried = running.pop(future)
                if isinstance(future.exception(), retried):
                    running[submit(job)] = job, ()
                else:
                    yield job, future.result()
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
