"""Files and names that survive a power cut whole, or are not there: the one place where the destination is written.

Order of a write, so that a file under its final name is always whole: a unique temp name in the same folder (one that
no loader's pattern matches), exclusive create that follows no link, final size, blocks, fsync, rename. An fsync that
failed is never repeated: the kernel may have dropped the pages, so only writing anew helps.

What is written goes to the disk at once and out of the page cache once it is durable: nothing piles up that an fsync
would have to wait for, and a control group that counts the cache has room for no more.
"""
from __future__ import annotations

import ctypes
import errno
import mmap
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import xxhash

from stream_reshard.errors import DestinationError, ResourceError, StreamReshardError, quoted
from stream_reshard.storage.folder import Folder

MAX_PIECES = 1024
"""Pieces one gathered write may have (IOV_MAX on Linux)."""

TEMP_NAME = re.compile(r"\..+\.[0-9a-f]{12}\.part")
"""Names of files that were being written when a run was killed."""

_libc = ctypes.CDLL(None, use_errno=True)
_sync_file_range = getattr(_libc, "sync_file_range", None)
_renameat2 = getattr(_libc, "renameat2", None)
_fallocate = getattr(_libc, "fallocate64", None) or getattr(_libc, "fallocate", None)
_SYNC_FILE_RANGE_WRITE = 2

_DIGESTED_NBYTES = 2**18
"""Bytes that are read back at a time: a piece stays in the processor's cache."""

_WRITEBACK_NBYTES = 2**18
"""Smaller writes wait for the next fsync: a request of its own costs more than it saves."""

_REFUSALS = frozenset({errno.EROFS, errno.EPERM, errno.EACCES, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP,
                       errno.EISDIR, errno.EEXIST, errno.EXDEV, errno.EBUSY, errno.ENOTEMPTY})
"""errno values that no retry cures."""

_CURES = {errno.ENOSPC: "; free some space and run the same command again",
          errno.EDQUOT: "; raise the quota or free some space, and run the same command again",
          errno.EFBIG: "; raise the limit on file sizes (ulimit -f) and run the same command again",
          errno.ENOENT: "; it was removed while the run went on: run the same command again, which writes what is "
                        "missing",
          errno.EXDEV: "; the file system does not rename it (overlayfs keeps folders of lower layers where they are): "
                       "move it away by a copy, or choose another DST"}


class WriteFault(ResourceError):
    """An I/O error of the destination: what was written may be lost, and only writing it anew can tell."""


def target_error(path: Path, error: OSError) -> StreamReshardError:
    """The error a user sees when `path` of the destination cannot be written."""
    kind = (WriteFault if error.errno == errno.EIO else
            DestinationError if error.errno in _REFUSALS else ResourceError)
    return kind(f"{quoted(path)}: {error.strerror or error}{_CURES.get(error.errno or 0, '')}")


def temp_name(name: str) -> str:
    """A new name for a file while it is written."""
    return f".{name}.{os.urandom(6).hex()}.part"


class NewFile:
    """A file being written. As a context manager it leaves a whole file under its final name, or nothing.

    Raises DestinationError or ResourceError, with the OSError as cause, from every method that touches the disk.
    """

    def __init__(self, folder: Folder, path: str, nbytes: int = 0, is_digested: bool = True, mode: int = 0o666):
        """`path`: below the folder. `nbytes`: its final size, where it is known: a full disk shows itself before the
        work then. `mode`: what it has at most, beside what the folder and the umask say."""
        self.folder, self.path, self.nbytes, self.is_digested = folder, path, nbytes, is_digested
        self.final = folder.path / path
        self._above, slash, name = path.rpartition("/")
        self.temp = self._above + slash + temp_name(name)
        self.mode = mode & folder.access.files
        self._digest: Any = xxhash.xxh3_128()
        self._position = 0
        """Past the last byte digested; -1 once bytes came out of order, or past this process."""
        self._descriptor = -1

    def __enter__(self) -> NewFile:
        try:
            self._descriptor = self._created()
            self._reserve()
        except OSError as error:
            self.abandon()
            raise target_error(self.final, error) from error
        return self

    def _created(self) -> int:
        """The descriptor of the new file. The folders above it are made where they are missing, but for the one that is
        held open: it would be another one."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            return os.open(self.temp, flags, self.mode, dir_fd=self.folder.descriptor)
        except FileNotFoundError:
            if not self._above:
                raise
            self.folder.make(self._above)
            return os.open(self.temp, flags, self.mode, dir_fd=self.folder.descriptor)

    def _reserve(self) -> None:
        """Take the final size at once; where the file system has no such call, its blocks come as they are written."""
        if self.nbytes and not fallocate(self._descriptor, self.nbytes):
            os.ftruncate(self._descriptor, self.nbytes)

    def write(self, offset: int, pieces: Sequence[memoryview | bytes], is_mapped: bool = False) -> None:
        """Write the pieces one behind the other from byte `offset` on.

        `is_mapped`: they are a mapping of a file that may shrink. The kernel reports that as EFAULT; this process must
        not touch them, it would be killed.
        """
        try:
            begin = offset
            for first in range(0, len(pieces), MAX_PIECES):
                offset = self._gather(offset, pieces[first:first + MAX_PIECES], is_mapped)
            if offset - begin >= _WRITEBACK_NBYTES:
                # A page that the next write goes on with is left to that one: begun now, it would be written twice.
                end = offset if offset == self.nbytes else offset // mmap.PAGESIZE * mmap.PAGESIZE
                start_writeback(self._descriptor, begin, end - begin)
        except OSError as error:
            raise target_error(self.final, error) from error

    def _gather(self, offset: int, pieces: Sequence[memoryview | bytes], is_mapped: bool) -> int:
        if offset == self._position and self.is_digested and not is_mapped:
            for piece in pieces:
                self._digest.update(piece)
        else:
            self._position = -1
        end = offset + sum(map(len, pieces))
        done = os.pwritev(self._descriptor, pieces, offset)
        if done < end - offset:
            self._finish_short_write(offset + done, pieces, done)
        if self._position >= 0:
            self._position = end
        self.nbytes = max(self.nbytes, end)
        return end

    def _finish_short_write(self, offset: int, pieces: Sequence[memoryview | bytes], done: int) -> None:
        for piece in pieces:
            rest, done = memoryview(piece)[done:], max(0, done - len(piece))
            write_all(self._descriptor, rest, offset)
            offset += len(rest)

    def _digest_again(self) -> None:
        """Digest the file as it stands, for bytes that did not come by in its order. They are still cached."""
        self._digest.reset()
        buffer = memoryview(bytearray(min(self.nbytes, _DIGESTED_NBYTES)))
        for offset in range(0, self.nbytes, len(buffer)):
            view = buffer[:min(len(buffer), self.nbytes - offset)]
            if os.preadv(self._descriptor, [view], offset) != len(view):
                raise OSError(errno.EIO, "what was written cannot be read back")
            self._digest.update(view)
        self._position = self.nbytes

    def commit(self) -> str | None:
        """Make the file durable under its final name; returns its xxh3_128 digest, in hex, if one is wanted.

        The new name itself is durable only after `sync_folder`.
        """
        try:
            if self.is_digested and self._position != self.nbytes:
                self._digest_again()
            os.fsync(self._descriptor)
            drop_from_cache(self._descriptor)
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)
            os.rename(self.temp, self.path, src_dir_fd=self.folder.descriptor, dst_dir_fd=self.folder.descriptor)
        except OSError as error:
            self.abandon()
            raise target_error(self.final, error) from error
        return self._digest.hexdigest() if self.is_digested else None

    def abandon(self) -> None:
        """Remove what was written so far; a failure to do so is left to the next run, which removes it."""
        descriptor, self._descriptor = self._descriptor, -1
        try:
            if descriptor >= 0:
                os.close(descriptor)
            os.unlink(self.temp, dir_fd=self.folder.descriptor)
        except OSError:
            pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if self._descriptor >= 0:
            self.abandon()


def fallocate(descriptor: int, nbytes: int) -> bool:
    """Give a file its size and its blocks; False where the file system cannot (fallocate(2)).

    That of the C library under the name of POSIX writes a byte into every block then: a million calls for 4 GiB.
    """
    while _fallocate is not None and _fallocate(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(nbytes)) != 0:
        code = ctypes.get_errno()
        if code in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            return False
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
    return _fallocate is not None


def start_writeback(descriptor: int, offset: int, nbytes: int) -> None:
    """Ask the kernel to bring a stretch of a file to the disk, without waiting (sync_file_range). It only saves time:
    whether it worked is for fsync to say."""
    if _sync_file_range is not None:
        _sync_file_range(descriptor, ctypes.c_int64(offset), ctypes.c_int64(nbytes), _SYNC_FILE_RANGE_WRITE)


def drop_from_cache(descriptor: int, offset: int = 0, nbytes: int = 0) -> None:
    """Give back what the page cache holds of a stretch of a file (0 bytes: all of it), as far as it is on the disk."""
    try:
        os.posix_fadvise(descriptor, offset, nbytes, os.POSIX_FADV_DONTNEED)
    except OSError:
        pass  # Advice only.


def write_all(descriptor: int, content: memoryview | bytes, offset: int) -> None:
    """Write all of `content` from byte `offset` on, however short the writes are."""
    rest = memoryview(content)
    while len(rest):
        count = os.pwrite(descriptor, rest, offset)
        if not count:
            raise OSError(errno.EIO, "nothing could be written")
        rest, offset = rest[count:], offset + count


def sync_folder(path: Path | str, below: Folder | None = None) -> None:
    """Make the names in a folder durable. File systems that cannot say EINVAL, which is tolerated."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    descriptor = os.open(path, flags, dir_fd=below.descriptor if below else None)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)


def sync_folders(below: Folder, paths: Iterable[str]) -> None:
    """Make the names in these folders below one durable, each folder once; "." is that one itself. Raises as NewFile
    does."""
    for path in dict.fromkeys(paths):
        try:
            sync_folder(path, below)
        except OSError as error:
            raise target_error(below.path / path, error) from error


def make_folder(path: Path, mode: int = 0o777) -> None:
    """Make a folder, of a mode at most, and what is missing above it, all of it durable."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(mode, parents=True, exist_ok=True)
    for folder in missing:
        sync_folder(folder.parent)


def exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; False where the file system or the C library cannot."""
    if _renameat2 is None:
        return False
    at_fdcwd, rename_exchange = -100, 2
    if _renameat2(at_fdcwd, os.fsencode(one), at_fdcwd, os.fsencode(other), rename_exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EXDEV):
        return False
    raise OSError(code, os.strerror(code), str(one))
