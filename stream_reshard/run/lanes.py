"""Lanes: while one block is written, the next is read. As many lanes as workers; in each, bytes move in one stream.

A disk likes to be read in order, so in a lane one job after the other reads by itself. What was read waits in a buffer
until the lane's assistant, a thread of its own, has put it in order, digested and written it::

    jobs        read A | read B | wait, read A | next job: read B ...
    assistant            write A | write B      | write A | write B ...

The next job begins to read when the one before has read everything; that one ends in a thread outside the lane: it
waits until all is written, and for the disk (fsync).
"""
from __future__ import annotations

import mmap
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any, TypeVar

from stream_reshard.storage.source_file import SourceFile

NUM_READ_BUFFERS = 5
NUM_BUFFERS = NUM_READ_BUFFERS + 1
"""Buffers of a lane: some to read into, and one for what must be put in order first. Casts take one more."""

MAX_UNUSED = 4
"""Source files that a lane keeps open although no job uses them."""

Result = TypeVar("Result")


class Lane:
    """Buffers, an assistant, and source files that stay open from job to job: the kernel reads ahead of a descriptor
    that is read in order."""

    def __init__(self, block_nbytes: int):
        """`block_nbytes`: size of one buffer. Touched as needed."""
        self._buffers = [_buffer(block_nbytes) for _ in range(NUM_READ_BUFFERS)]
        self._writing: list[Future[Any] | None] = [None] * NUM_READ_BUFFERS
        self._next = 0
        self._assistant = ThreadPoolExecutor(1)
        self.scratch, self.results = _buffer(block_nbytes), _buffer(block_nbytes)
        """For the assistant alone: what is put in order, and results of casts."""
        self._open: OrderedDict[str, SourceFile] = OrderedDict()
        self._users: Counter[str] = Counter()
        self._lock = threading.Lock()

    def buffer(self) -> memoryview:
        """The next buffer to read into; waits until what was in it is written."""
        writing = self._writing[self._next]
        if writing is not None:
            writing.exception()  # Its own job raises it.
        return self._buffers[self._next]

    def submit(self, task: Callable[[], Result], reads: bool = True) -> Future[Result]:
        """Let the assistant do this, after everything it was given before. With `reads` it reads the buffer that came
        last, which is not free until it has."""
        future = self._assistant.submit(task)
        if reads:
            self._writing[self._next] = future
            self._next = (self._next + 1) % NUM_READ_BUFFERS
        return future

    @contextmanager
    def source(self, path: str, open_source: Callable[[], SourceFile]) -> Iterator[SourceFile]:
        """A source file, opened if it is not. It stays open while it is used, also after the lane was given on."""
        with self._lock:
            if path not in self._open:
                self._open[path] = open_source()
            self._open.move_to_end(path)
            self._users[path] += 1
        try:
            yield self._open[path]
        finally:
            with self._lock:
                self._users[path] -= 1
                self._close_unused(MAX_UNUSED)

    def _close_unused(self, num_left: int) -> None:
        unused = [path for path in self._open if not self._users[path]]
        for path in unused[:max(0, len(unused) - num_left)]:
            self._open.pop(path).close()

    def close(self) -> None:
        """Let the assistant go, and close the source files."""
        self._assistant.shutdown()
        with self._lock:
            self._close_unused(0)


class Writing:
    """Writes that one job has given to the assistant of its lane."""

    def __init__(self, lane: Lane):
        self.lane = lane
        self._last: Future[Any] | None = None
        self._error: BaseException | None = None

    def write(self, task: Callable[[], None], reads: bool = True) -> None:
        """Let the assistant do this after what came before it; `reads`: whether it needs the buffer that came last.
        Raises what that has raised: then nothing more is done."""
        if self._error is not None:
            raise self._error
        self._last = self.lane.submit(lambda: self._do(task), reads)

    def _do(self, task: Callable[[], None]) -> None:
        if self._error is None:
            try:
                task()
            except BaseException as error:
                self._error = error

    def wait(self) -> None:
        """Until all of it is done, or nothing more will be. Raises what it raised."""
        if self._last is not None:
            self._last.result()
        if self._error is not None:
            raise self._error

    @contextmanager
    def settled(self) -> Iterator[None]:
        """At the end of this, however it comes, nothing of the job is being written any more."""
        try:
            yield
        except BaseException as error:
            self._error = self._error or error
            if self._last is not None:
                self._last.result()
            raise
        self.wait()


class Lanes:
    """The lanes of a run, with one reading thread each, and a few threads in which jobs end that have read everything.

    Jobs are read in the order in which they are submitted, which is that of the source's bytes: jobs that overtake each
    other would make the disk jump, and the kernel read ahead what was read and given back already.
    """

    def __init__(self, num_lanes: int, block_nbytes: int, num_jobs: int):
        """`block_nbytes`: size of one buffer. `num_jobs`: jobs that will be under way at once."""
        self._all = [Lane(block_nbytes) for _ in range(num_lanes)]
        self._free: SimpleQueue[Lane] = SimpleQueue()
        for lane in self._all:
            self._free.put(lane)
        self._readers = ThreadPoolExecutor(num_lanes)
        self._finishers = ThreadPoolExecutor(max(1, num_jobs - num_lanes))

    def submit(self, read: Callable[[Lane], Callable[[], Result]]) -> Future[Result]:
        """Let a reading thread call `read` with its lane, and another thread what that returns: the end of the job,
        whose result is the future's. Either may raise. A job can be cancelled until it begins to read."""
        done: Future[Result] = Future()
        self._readers.submit(self._read, read, done)
        return done

    def _read(self, read: Callable[[Lane], Callable[[], Result]], done: Future[Result]) -> None:
        if not done.set_running_or_notify_cancel():
            return
        lane = self._free.get()
        try:
            self._finishers.submit(_finish, read(lane), done)
        except BaseException as error:
            done.set_exception(error)
        finally:
            self._free.put(lane)

    def buffer(self) -> memoryview:
        """A buffer, for a time when no job is under way."""
        return self._all[0].scratch

    def close(self) -> None:
        """Wait for the jobs under way, let all threads go, and close the source files."""
        self._readers.shutdown()
        self._finishers.shutdown()
        for lane in self._all:
            lane.close()


def _finish(rest: Callable[[], Result], done: Future[Result]) -> None:
    try:
        done.set_result(rest())
    except BaseException as error:
        done.set_exception(error)


def _buffer(nbytes: int) -> memoryview:
    """Memory that is touched as needed, and private: Python's default would let a forked process write into its
    parent's."""
    return memoryview(mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
