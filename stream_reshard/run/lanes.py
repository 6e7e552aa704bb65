"""Lanes: while one block is written, the next is read. As many lanes as workers; in each, bytes move in one stream.

A disk likes to be read in order, so in a lane one job after the other reads by itself. What was read waits in a buffer
until the lane's assistant, a thread of its own, has put it in order, digested and written it::

    jobs        read A | read B | wait, read A | next job: read B ...
    assistant            write A | write B      | write A | write B ...

The next job begins to read when the one before has read everything; that one then waits, outside the lane, until it is
written, and for the disk (fsync).
"""
from __future__ import annotations

import mmap
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

from stream_reshard.storage.source_file import SourceFile

NUM_READ_BUFFERS = 5
NUM_BUFFERS = NUM_READ_BUFFERS + 1
"""Buffers of a lane: some to read into, and one for what must be put in order first."""

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
        self.scratch = _buffer(block_nbytes)
        """For the assistant alone."""
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
    """The lanes of a run, shared by all its threads; another process has its own.

    Jobs take a lane in the order in which they drew their tickets, which is that of the source's bytes: threads that
    overtake each other would make the disk jump, and the kernel read ahead what was read and given back already.
    """

    def __init__(self, num_workers: int, block_nbytes: int):
        """`block_nbytes`: size of one buffer."""
        self._made_of = num_workers, block_nbytes
        self._all = [Lane(block_nbytes) for _ in range(num_workers)]
        self._free = list(self._all)
        self._lock = threading.Lock()
        self._waiting: dict[int, threading.Condition] = {}
        """By ticket, those who wait for their turn: each is woken for itself, a crowd would keep the one who reads from
        running."""
        self._num_drawn = self._next = 0
        """Tickets drawn; the first of them that still may take a lane."""
        self._done: set[int] = set()
        """Later tickets that have a lane already or were given up."""

    def __reduce__(self) -> tuple[type[Lanes], tuple[int, int]]:
        return Lanes, self._made_of

    @contextmanager
    def ticket(self) -> Iterator[int]:
        """For one job: its place among those that wait for a lane, given up at the end if it was not used."""
        with self._lock:
            ticket, self._num_drawn = self._num_drawn, self._num_drawn + 1
        try:
            yield ticket
        finally:
            self._pass(ticket)

    def _pass(self, ticket: int) -> None:
        """Those behind this one need not wait for it any more."""
        with self._lock:
            if ticket >= self._next:
                self._done.add(ticket)
            while self._next in self._done:
                self._done.remove(self._next)
                self._next += 1
            self._call()

    def _is_turn_of(self, ticket: int) -> bool:
        return bool(self._free) and self._next >= ticket

    def _call(self) -> None:
        """Wake those whose turn it is."""
        for ticket, turn in self._waiting.items():
            if self._is_turn_of(ticket):
                turn.notify()

    @contextmanager
    def taken(self, ticket: int) -> Iterator[Lane]:
        """Wait until those before have had their turn, and for a lane; hold it."""
        with self._lock:
            turn = self._waiting[ticket] = threading.Condition(self._lock)
            turn.wait_for(lambda: self._is_turn_of(ticket))
            del self._waiting[ticket]
            lane = self._free.pop()
        self._pass(ticket)
        try:
            yield lane
        finally:
            with self._lock:
                self._free.append(lane)
                self._call()

    def close(self) -> None:
        """Let the assistants go, and close the source files."""
        for lane in self._all:
            lane.close()


def _buffer(nbytes: int) -> memoryview:
    """Memory that is touched as needed, and private: Python's default would let a forked process write into its
    parent's."""
    return memoryview(mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
