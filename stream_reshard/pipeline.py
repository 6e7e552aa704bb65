"""Pipeline: one block is written while the next one is read.

A disk likes one stream that is read in order, so a job reads by itself; what is read waits in one of two buffers, until
an assistant, a thread of its own, has digested and written it::

    job        read A | read B | wait, read A | wait, read B ...
    assistant           write A | write B       | write A ...
"""
from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

NUM_BUFFERS = 3
"""Of one pipeline: two to read into, one for what must be put in order first."""


class Pipeline:
    """The buffers of one job at a time, and its assistant."""

    def __init__(self, block_nbytes: int):
        """`block_nbytes`: size of one buffer. Touched as needed."""
        self._buffers = [_buffer(block_nbytes) for _ in range(NUM_BUFFERS - 1)]
        self._writing: list[Future[None] | None] = [None] * len(self._buffers)
        self._turn = 0
        self._assistant: ThreadPoolExecutor | None = None
        self.scratch = _buffer(block_nbytes)
        """For the assistant alone."""

    def buffer(self) -> memoryview:
        """The next buffer to read into; waits until what was in it is written. Raises what writing it raised."""
        writing, self._writing[self._turn] = self._writing[self._turn], None
        if writing:
            writing.result()
        return self._buffers[self._turn]

    def write(self, task: Callable[[], None]) -> None:
        """Let the assistant do this, after everything it was given before: it needs the buffer that came last."""
        if self._assistant is None:
            self._assistant = ThreadPoolExecutor(1)
        self._writing[self._turn] = self._assistant.submit(task)
        self._turn = (self._turn + 1) % len(self._buffers)

    def drain(self) -> None:
        """Wait until everything is written. Raises what writing it raised."""
        for _ in self._buffers:
            self.buffer()
            self._turn = (self._turn + 1) % len(self._buffers)

    @contextmanager
    def used(self) -> Iterator[Pipeline]:
        """For one job: at its end, however it comes, nothing of it is being written any more."""
        try:
            yield self
            self.drain()
        finally:
            for writing in filter(None, self._writing):
                writing.cancel() or writing.exception()
            self._writing = [None] * len(self._buffers)

    def close(self) -> None:
        """Let the assistant go."""
        if self._assistant is not None:
            self._assistant.shutdown()
            self._assistant = None


def _buffer(nbytes: int) -> memoryview:
    """Memory that is touched as needed, and private: Python's default would let a forked process write into its
    parent's."""
    return memoryview(mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
