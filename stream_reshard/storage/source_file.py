"""Reading the bytes of tensor files: into a buffer, or through a mapping that the kernel writes from.

Bytes that were used are dropped from the mapping and the page cache at once, so that neither the resident set nor the
page cache grows with the model.
"""
from __future__ import annotations

import errno
import mmap
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import xxhash

from stream_reshard.errors import ResourceError, SourceError, StreamReshardError, quoted
from stream_reshard.machine.stop import Stop
from stream_reshard.storage.durable import drop_from_cache
from stream_reshard.storage.header import StoredTensor
from stream_reshard.storage.identity import Identity, changed, identity_of
from stream_reshard.storage.read_ahead import ReadAhead, window_on
from stream_reshard.storage.small_files import read_error

READ_RETRIES = 3
"""Retries of a read that failed with one of `_RETRIED_ERRNOS`, each after a longer pause."""

FIRST_PAUSE_SECONDS = 0.1

_FOLIO_NBYTES = 8 * 2**20
"""Largest piece of the page cache (a folio; MAX_PAGECACHE_ORDER of Linux 6.18). The kernel drops no folio that reaches
beyond the released stretch, so that folio is released once more, together with the stretch that follows."""

_MAX_RELEASED_ENDS = 64
"""Ends of released stretches that a file remembers."""

_RETRIED_ERRNOS = frozenset({errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN})
"""errno values of a read while a server, or a path to it, is down for a moment."""


class SourceFile:
    """A tensor file opened for reading. Threads may share it. A file that shrank is an error, not a signal."""

    def __init__(self, root: Path, path: str, identity: Identity | None = None, is_mapped: bool = False):
        """Opens `root / path`. Raises SourceError if its identity is not `identity`; None accepts any file."""
        self.root, self.path, self.identity = root, path, identity
        self._descriptor = self._open()
        self._mapping = self._mapped() if is_mapped else None
        self._ahead = ReadAhead(window_on(os.fstat(self._descriptor).st_dev))
        self._released: dict[int, int] = {}
        """By the end of a released stretch: the byte from which on the stretch that follows is to be released."""

    @property
    def is_mapped(self) -> bool:
        """The file is mapped, and `view` can be called."""
        return self._mapping is not None

    @property
    def descriptor(self) -> int:
        """For system calls that move bytes without passing them through this process."""
        return self._descriptor

    def _mapped(self) -> mmap.mmap:
        """A read-only mapping (a writable private one would count against RLIMIT_DATA)."""
        try:
            return mmap.mmap(self._descriptor, 0, mmap.MAP_SHARED, mmap.PROT_READ)
        except (OSError, ValueError) as error:
            raise SourceError(f"{quoted(self.path)} cannot be mapped: {error}; run with --io pread") from error

    def view(self, offset: int, nbytes: int) -> memoryview:
        """Bytes of the mapping, for the kernel to write from. This process must not read them: if the file shrank, that
        would kill it (SIGBUS). Raises SourceError if the mapping is too short."""
        assert self._mapping is not None, "the file was opened without a mapping"
        if offset + nbytes > len(self._mapping):
            raise self.shrank(offset + nbytes)
        return memoryview(self._mapping)[offset:offset + nbytes]

    def shrank(self, end: int) -> SourceError:
        """The error for a file that ends before byte `end`."""
        return SourceError(f"{quoted(self.path)} shrank during the run: it ends before byte {end}; nothing was "
                           f"committed")

    def mapping_fault(self) -> StreamReshardError:
        """The error for a mapping that the kernel could not read (EFAULT): the file shrank, or its disk is broken."""
        size = os.fstat(self._descriptor).st_size
        if self._mapping is not None and size < len(self._mapping):
            return self.shrank(len(self._mapping))
        return ResourceError(f"{quoted(self.path)} cannot be read through a mapping; run with --io pread, which "
                             f"reports the reason")

    def release(self, offset: int, nbytes: int) -> None:
        """Drop a stretch that will not be read again from the mapping and from the page cache."""
        begin, end = self._released.pop(offset, offset), offset + nbytes
        if self._mapping is not None:  # First, because the page cache keeps mapped pages.
            page = begin // mmap.PAGESIZE * mmap.PAGESIZE  # A page fault maps the pages around it too.
            self._mapping.madvise(mmap.MADV_DONTNEED, page, end - page)
        drop_from_cache(self._descriptor, begin, end - begin)
        self._released[end] = max(begin, end - _FOLIO_NBYTES)
        if len(self._released) > _MAX_RELEASED_ENDS:
            del self._released[next(iter(self._released))]

    def _open(self) -> int:
        try:
            descriptor = os.open(self.root / self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            if self.identity and isinstance(error, FileNotFoundError):
                raise changed(self.path, self.identity, None) from error
            raise read_error(quoted(self.path), error) from error
        now = identity_of(os.fstat(descriptor))
        if self.identity and now != self.identity:
            os.close(descriptor)
            raise changed(self.path, self.identity, now)
        return descriptor

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill `view` with the bytes from `offset` on. Raises SourceError if the file is shorter, ResourceError if the
        last attempt to read fails."""
        done = 0
        self._ahead.before_read(self._descriptor, offset, len(view))
        while done < len(view):
            count = self._read_some(view[done:], offset + done)
            if not count:
                raise self.shrank(offset + len(view))
            done += count

    def _read_some(self, view: memoryview, offset: int) -> int:
        """Number of bytes read by one call that succeeds; 0 at the end of the file."""
        attempt, pause = 1, FIRST_PAUSE_SECONDS
        while True:
            try:
                return os.preadv(self._descriptor, [view], offset)
            except OSError as error:
                if error.errno not in _RETRIED_ERRNOS or attempt > READ_RETRIES:
                    raise ResourceError(f"{quoted(self.path)}: {error.strerror} at byte {offset}, after {attempt} "
                                        f"attempts to read it") from error
                is_stale = error.errno == errno.ESTALE
            time.sleep(pause)
            attempt, pause = attempt + 1, 3 * pause
            if is_stale:
                self.close()
                self._descriptor = self._open()

    def read(self, offset: int, nbytes: int) -> bytes:
        """So many bytes from `offset` on, for a few. Raises as `read_into` does."""
        content = bytearray(nbytes)
        self.read_into(memoryview(content), offset)
        return bytes(content)

    def pieces(self, offset: int, nbytes: int, buffer: memoryview, stop: Stop) -> Iterator[memoryview]:
        """The bytes from `offset` on, a `buffer` at a time; before each a stop may end it."""
        for begin in range(0, nbytes, len(buffer)):
            stop.check()
            view = buffer[:min(len(buffer), nbytes - begin)]
            self.read_into(view, offset + begin)
            yield view

    def forget(self) -> None:
        """Drop the clean pages of the file from the page cache, so that the next read comes from the disk."""
        drop_from_cache(self._descriptor)

    def close(self) -> None:
        """Close the descriptor."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        self._mapping = None  # Unmapped with its last view.

    def __enter__(self) -> SourceFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def same_bytes(root: Path, first: StoredTensor, second: StoredTensor, buffer_nbytes: int = 2**20) -> bool:
    """True if two tensors of one checkpoint have equal dtype, shape and bytes; reads both, in bounded memory."""
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
    """Digest of a whole file, in hex, read through `buffer` from the disk instead of the page cache."""
    digest = algorithm()
    with SourceFile(root, path) as file:
        file.forget()
        nbytes = os.stat(root / path).st_size
        for view in file.pieces(0, nbytes, buffer, stop):
            digest.update(view)
    return str(digest.hexdigest())
