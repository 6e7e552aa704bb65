"""Reading the bytes of tensor files: into a buffer, or through a mapping that the kernel writes from.

What was read is given back to the kernel at once, so that neither the resident set nor the page cache grows with the
model.
"""
from __future__ import annotations

import errno
import mmap
import os
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import xxhash

from stream_reshard.errors import ResourceError, SourceError, StreamReshardError, quoted
from stream_reshard.machine.kernel import group_limit, read_ahead_nbytes
from stream_reshard.machine.stop import Stop
from stream_reshard.storage.durable import drop_from_cache
from stream_reshard.storage.header import StoredTensor
from stream_reshard.storage.identity import Identity, changed, identity_of
from stream_reshard.storage.small_files import read_error

READ_RETRIES = 3
"""Times a read that failed in a way that may pass is tried again, each after a longer pause."""

FIRST_PAUSE_SECONDS = 0.1

_FOLIO_NBYTES = 8 * 2**20
"""The most that a page cache holds as one piece (a folio; MAX_PAGECACHE_ORDER). One that reaches beyond what is given
back stays, so it has to be given back again together with what follows: or nearly all of them stay."""

_ASK_NBYTES = 2**20
"""Distance of the bytes by which more is asked for: that of the large folios in which a stream is cached."""

_MIN_WINDOWS = 16
"""A control group that counts the page cache has room for so many windows, or no more is asked for than the kernel
reads by itself: what is there too early is dropped, and read twice."""

_MAX_STRETCHES = 64
"""Places in a file of which it is known that what follows may come later."""

_RETRIED = frozenset({errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN})
"""errno values of a read while a server or a path to it is away for a moment."""


class ReadAhead:
    """Has the kernel read ahead earlier of a descriptor that is read in order.

    By itself it begins with the next window when the last one is reached. A reader that is kept from reading at that
    moment leaves the disk without work. So bytes up to a window ahead are touched by reads that wait for nothing
    (RWF_NOWAIT); they find the mark that begins the next window. POSIX_FADV_WILLNEED is no such thing: it caches page
    by page, which costs more than is gained. Threads that share it at worst ask less: their reads are not in order.
    """

    def __init__(self, window_nbytes: int):
        """`window_nbytes`: how far the kernel reads ahead."""
        self._reach = window_nbytes - _ASK_NBYTES if hasattr(os, "RWF_NOWAIT") else 0
        self._byte = bytearray(1)
        self._begin = self._next = self._asked = 0
        """Offsets in bytes: begin of reading in order, end of the last read, end of what was asked for."""

    def ask(self, descriptor: int, offset: int, nbytes: int) -> None:
        """To be called before the bytes from `offset` on are read."""
        if offset != self._next:
            self._begin = self._asked = offset
        self._next = offset + nbytes
        if offset - self._begin < self._reach:
            return  # The kernel's windows are still growing, and nothing would be found that far ahead.
        self._asked = max(self._asked, self._next)
        while self._asked < offset + self._reach:
            try:
                os.preadv(descriptor, [self._byte], self._asked, os.RWF_NOWAIT)
            except BlockingIOError:
                pass  # On its way.
            except OSError:
                self._reach = 0  # Not every file system can; what else is wrong is for the read itself to say.
            self._asked += _ASK_NBYTES


@lru_cache(maxsize=64)
def _window_on(device: int) -> int:
    """The window for `ReadAhead` of files on a device (`st_dev`); 0 where nothing should be asked for."""
    window, limit = read_ahead_nbytes(device), group_limit()
    return window if limit is None or _MIN_WINDOWS * window <= limit else 0


class SourceFile:
    """A tensor file opened for reading: safe to share, and a file that shrank is an error instead of a signal."""

    def __init__(self, root: Path, path: str, identity: Identity | None = None, is_mapped: bool = False):
        """Opens `root / path`. Raises SourceError where it is not the file of that `identity`."""
        self.root, self.path, self.identity = root, path, identity
        self._descriptor = self._open()
        self._mapping = self._mapped() if is_mapped else None
        self._ahead = ReadAhead(_window_on(os.fstat(self._descriptor).st_dev))
        self._kept: dict[int, int] = {}
        """By the end of each stretch that was released: from where on it must be released again with what follows."""

    @property
    def is_mapped(self) -> bool:
        """There is a mapping that can be written from."""
        return self._mapping is not None

    @property
    def descriptor(self) -> int:
        """For calls that read from it without this process."""
        return self._descriptor

    def _mapped(self) -> mmap.mmap:
        """A read-only mapping (a writable private one counts against limits on memory: RLIMIT_DATA)."""
        try:
            return mmap.mmap(self._descriptor, 0, mmap.MAP_SHARED, mmap.PROT_READ)
        except (OSError, ValueError) as error:
            raise SourceError(f"{quoted(self.path)} cannot be mapped: {error}; --io pread reads it") from error

    def view(self, offset: int, nbytes: int) -> memoryview:
        """Bytes of the mapping, for the kernel to write from. This process must not touch them: where the file shrank,
        that would kill it. Raises SourceError where the file was shorter when it was mapped."""
        assert self._mapping is not None, "it was opened without a mapping"
        if offset + nbytes > len(self._mapping):
            raise self.shrank(offset + nbytes)
        return memoryview(self._mapping)[offset:offset + nbytes]

    def shrank(self, end: int) -> SourceError:
        """The error of a file that ends before byte `end`."""
        return SourceError(f"{quoted(self.path)} shrank during the run: it ends before byte {end}; nothing was "
                           f"committed")

    def mapping_fault(self) -> StreamReshardError:
        """The error of a mapping that the kernel could not read (EFAULT): the file shrank, or its disk is broken."""
        size = os.fstat(self._descriptor).st_size
        if self._mapping is not None and size < len(self._mapping):
            return self.shrank(len(self._mapping))
        return ResourceError(f"{quoted(self.path)} cannot be read through a mapping; --io pread says what is wrong")

    def release(self, offset: int, nbytes: int) -> None:
        """Give back the memory that a stretch which will not be read again takes, in this process and in the cache."""
        begin, end = self._kept.pop(offset, offset), offset + nbytes
        if self._mapping is not None:  # First: what is mapped stays in the cache, and a fault maps pages around it.
            first = begin // mmap.PAGESIZE * mmap.PAGESIZE
            self._mapping.madvise(mmap.MADV_DONTNEED, first, end - first)
        drop_from_cache(self._descriptor, begin, end - begin)
        self._kept[end] = max(begin, end - _FOLIO_NBYTES)
        if len(self._kept) > _MAX_STRETCHES:
            del self._kept[next(iter(self._kept))]

    def _open(self) -> int:
        try:
            descriptor = os.open(self.root / self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError as error:
            if self.identity:
                raise changed(self.path, self.identity, None) from error
            raise SourceError(f"{quoted(self.path)}: {error.strerror}") from error
        except OSError as error:
            raise read_error(quoted(self.path), error) from error
        now = identity_of(os.fstat(descriptor))
        if self.identity and now != self.identity:
            os.close(descriptor)
            raise changed(self.path, self.identity, now)
        return descriptor

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill `view` with the bytes from `offset` on.

        Raises SourceError where there are fewer, ResourceError where reading fails again and again.
        """
        done = 0
        self._ahead.ask(self._descriptor, offset, len(view))
        while done < len(view):
            count = self._read_some(view[done:], offset + done)
            if not count:
                raise self.shrank(offset + len(view))
            done += count

    def _read_some(self, view: memoryview, offset: int) -> int:
        pause = FIRST_PAUSE_SECONDS
        for attempt in range(READ_RETRIES + 1):
            try:
                return os.preadv(self._descriptor, [view], offset)
            except OSError as error:
                if error.errno not in _RETRIED or attempt == READ_RETRIES:
                    raise ResourceError(f"{quoted(self.path)}: {error.strerror} at byte {offset}, after {attempt + 1} "
                                        f"attempts to read it") from error
                stale = error.errno == errno.ESTALE
            time.sleep(pause)
            pause *= 3
            if stale:
                self.close()
                self._descriptor = self._open()
        raise AssertionError("the last attempt returns or raises")

    def forget(self) -> None:
        """Drop what the kernel has cached of the file, as far as it is on disk: the next read asks the disk."""
        drop_from_cache(self._descriptor)

    def close(self) -> None:
        """Give the descriptor back."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        self._mapping = None  # It goes with its last view.

    def __enter__(self) -> SourceFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def same_bytes(root: Path, first: StoredTensor, second: StoredTensor, buffer_nbytes: int = 2**20) -> bool:
    """True where two tensors of one checkpoint hold the same dtype, shape and bytes; reads both, in bounded memory."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    if (first.file, first.begin) == (second.file, second.begin):
        return True  # Files of torch may share.
    with SourceFile(root, first.file) as one, SourceFile(root, second.file) as two:
        for offset in range(0, first.nbytes, buffer_nbytes):
            size = min(buffer_nbytes, first.nbytes - offset)
            views = memoryview(bytearray(size)), memoryview(bytearray(size))
            one.read_into(views[0], first.begin + offset)
            two.read_into(views[1], second.begin + offset)
            if views[0] != views[1]:
                return False
    return True


def digest_of(root: Path, path: str, buffer: memoryview, stop: Stop,
              algorithm: Callable[[], Any] = xxhash.xxh3_128) -> str:
    """Digest of a whole file, in hex, read through `buffer` from the disk and not from the cache."""
    digest = algorithm()
    with SourceFile(root, path) as file:
        file.forget()
        nbytes = os.stat(root / path).st_size
        for offset in range(0, nbytes, len(buffer)):
            stop.check()
            view = buffer[:min(len(buffer), nbytes - offset)]
            file.read_into(view, offset)
            digest.update(view)
    return str(digest.hexdigest())
