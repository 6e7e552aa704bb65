"""Requests for bytes ahead of a reader, so that the disk has work while the reader does something else.

By itself the kernel begins its next window of read-ahead when the reader reaches the end of the last one. A reader that
is busy at that moment, such as with writing, leaves the disk idle. Here bytes up to a window ahead are touched by reads
that never wait (RWF_NOWAIT); they hit the mark at which the kernel begins its next window.

Measured on Linux 6.18 with 2 cores and ext4 on one virtual disk: without the requests the disk was idle a fifth of the
time. POSIX_FADV_WILLNEED costs more than it gains, as it caches page by page. On other kernels and disks the requests
are as harmless, but may gain nothing.
"""
from __future__ import annotations

import os
from functools import lru_cache

from stream_reshard.machine.kernel import group_limit, read_ahead_nbytes

_STEP_NBYTES = 2**20
"""Distance between the touched bytes: the size of the large folios in which the kernel caches a stream."""

_MIN_WINDOWS = 16
"""Windows for which a control group that counts the page cache must have room. With less room nothing is requested:
bytes would be dropped before they are used, and read twice."""


class ReadAhead:
    """Requests for one descriptor that is read in order. If threads share it, their reads are not in order, and fewer
    bytes are requested."""

    def __init__(self, window_nbytes: int):
        """`window_nbytes`: how far the kernel reads ahead; 0 turns the requests off."""
        self._reach = window_nbytes - _STEP_NBYTES if hasattr(os, "RWF_NOWAIT") else 0
        self._byte = bytearray(1)
        self._begin = self._end = self._requested_end = 0
        """Begin of the reads in order, end of the last read, end of the requested bytes."""

    def before_read(self, descriptor: int, offset: int, nbytes: int) -> None:
        """Request bytes beyond those of a read that is about to begin."""
        if offset != self._end:
            self._begin = self._requested_end = offset
        self._end = offset + nbytes
        if offset - self._begin < self._reach:
            return  # The kernel's windows are still growing, and the mark is not that far ahead.
        self._requested_end = max(self._requested_end, self._end)
        while self._requested_end < offset + self._reach:
            try:
                os.preadv(descriptor, [self._byte], self._requested_end, os.RWF_NOWAIT)
            except BlockingIOError:
                pass  # The kernel has begun to read it.
            except OSError:
                self._reach = 0  # The file system has no RWF_NOWAIT. Any other error the read itself reports.
            self._requested_end += _STEP_NBYTES


@lru_cache(maxsize=64)
def window_on(device: int) -> int:
    """The window for `ReadAhead` of files on a device (`st_dev`); 0 if nothing should be requested."""
    window, limit = read_ahead_nbytes(device), group_limit()
    return window if limit is None or _MIN_WINDOWS * window <= limit else 0
