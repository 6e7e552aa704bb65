"""Files and names that survive a power cut whole, or are absent: the one module that writes to the destination.

Order of a write, so that a file under its final name is always whole: a unique temp name in the same folder (one that
no loader's pattern matches), exclusive create that follows no link, final size, blocks, fsync, rename. An fsync that
failed is never repeated: the kernel may have dropped the pages, and then only a new file holds the bytes.

Writeback begins with each write, and durable pages leave the page cache. So an fsync never waits for a backlog, and the
cache stays small in a control group that counts it.
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
"""Most pieces of one gathered write (IOV_MAX on Linux)."""

TEMP_NAME = re.compile(r"\..+\.[0-9a-f]{12}\.part")
"""Names of unfinished files: `temp_name` makes them, and a killed run leaves them."""

_libc = ctypes.CDLL(None, use_errno=True)
_sync_file_range = getattr(_libc, "sync_file_range", None)
_renameat2 = getattr(_libc, "renameat2", None)
_fallocate = getattr(_libc, "fallocate64", None) or getattr(_libc, "fallocate", None)
_SYNC_FILE_RANGE_WRITE, _SYNC_FILE_RANGE_ALL = 2, 7  # The second also waits, before and after.
_SYNC_FILE_RANGE_WRITE_AND_WAIT = 7

_DIGESTED_NBYTES = 2**18
"""Bytes read back at a time for a digest: so many stay in the cache of the processor."""

_WRITEBACK_NBYTES = 2**18
"""Shorter writes do not begin writeback: the call costs more than it saves."""

_PERMANENT_ERRNOS = frozenset({
    errno.EROFS, errno.EPERM, errno.EACCES, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EISDIR, errno.EEXIST,
    errno.EXDEV, errno.EBUSY, errno.ENOTEMPTY})
"""errno values that no retry cures."""

_CURES = {errno.ENOSPC: "; free some space and run the same command again",
          errno.EDQUOT: "; raise the quota or free some space, and run the same command again",
          errno.EFBIG: "; raise the limit on file sizes (ulimit -f) and run the same command again",
          errno.ENOENT: "; it was removed during the run; run the same command again, which writes the missing files",
          errno.EXDEV: "; the file system cannot rename it (on overlayfs it is a folder of a lower layer); copy it "
                       "elsewhere and remove it, or choose another DST"}


class WriteFault(ResourceError):
    """An I/O error of the destination: bytes already written may be lost, so the file has to be written again."""


def target_error(path: Path, error: OSError) -> StreamReshardError:
    """The error for a `path` of the destination that cannot be written."""
    kind = (WriteFault if error.errno == errno.EIO else
            DestinationError if error.errno in _PERMANENT_ERRNOS else ResourceError)
    return kind(f"{quoted(path)}: {error.strerror or error}{_CURES.get(error.errno or 0, '')}")


def temp_name(name: str) -> str:
    """A new temporary name for a file that is being written."""
    return f".{name}.{os.urandom(6).hex()}.part"


class NewFile:
    """A file being written. The context leaves a whole file under its final name, or nothing.

    Every method that touches the disk raises DestinationError or ResourceError, with the OSError as cause.
    """

    def __init__(self, folder: Folder, path: str, nbytes: int = 0, is_digested: bool = True, mode: int = 0o666):
        """`path`: relative to the folder. `nbytes`: final size, if known; a full disk is then noticed before the first
        byte. `mode`: permission bits, of which the folder's access and the umask take away."""
        self.folder, self.path, self.nbytes, self.is_digested = folder, path, nbytes, is_digested
        self.final = folder.path / path
        self._above, slash, name = path.rpartition("/")
        self.temp = self._above + slash + temp_name(name)
        self.mode = mode & folder.access.files
        self._digest: Any = xxhash.xxh3_128()
        self._position = 0
        """End of the digested bytes; -1 once bytes came out of order or bypassed this process."""
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
        """The descriptor of the new file. Missing folders above it are made, except `self.folder`: a new one under its
        path would not be the folder that the run holds."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            return os.open(self.temp, flags, self.mode, dir_fd=self.folder.descriptor)
        except FileNotFoundError:
            if not self._above:
                raise
            self.folder.make(self._above)
            return os.open(self.temp, flags, self.mode, dir_fd=self.folder.descriptor)

    def _reserve(self) -> None:
        """Set the final size and allocate its blocks; without fallocate each write allocates those that it fills."""
        if self.nbytes and not fallocate(self._descriptor, self.nbytes):
            os.ftruncate(self._descriptor, self.nbytes)

    def write(self, offset: int, pieces: Sequence[memoryview | bytes], is_mapped: bool = False) -> None:
        """Write the pieces one after the other from byte `offset` on.

        `is_mapped`: the pieces are in a mapping of a file that may shrink. The kernel reports that as EFAULT, while a
        read by this process would end it with SIGBUS.
        """
        try:
            begin = offset
            for first in range(0, len(pieces), MAX_PIECES):
                offset = self._gather(offset, pieces[first:first + MAX_PIECES], is_mapped)
            if offset - begin >= _WRITEBACK_NBYTES:
                # The last page may be incomplete. The next write completes it; now it would reach the disk twice.
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
        """Digest the file by reading it back, for bytes that were written out of order; they are still cached."""
        self._digest.reset()
        buffer = memoryview(bytearray(min(self.nbytes, _DIGESTED_NBYTES)))
        for offset in range(0, self.nbytes, len(buffer)):
            view = buffer[:min(len(buffer), self.nbytes - offset)]
            if os.preadv(self._descriptor, [view], offset) != len(view):
                raise OSError(errno.EIO, "the file is shorter than what was written")
            self._digest.update(view)
        self._position = self.nbytes

    def commit(self) -> str | None:
        """Sync the file and give it its final name; returns its xxh3_128 digest in hex, None if no digest is wanted.

        The new name itself is durable only after `sync_names`.
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
        """Remove the unfinished file. If that fails, the next run removes it."""
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
    """Set the size of a file and allocate its blocks; False if the file system cannot (fallocate(2)).

    posix_fallocate would then write a byte into every block: a million calls for 4 GiB.
    """
    while _fallocate is not None and _fallocate(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(nbytes)) != 0:
        code = ctypes.get_errno()
        if code in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            return False
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
    return _fallocate is not None


def start_writeback(descriptor: int, offset: int, nbytes: int) -> None:
    """Begin to write a stretch of a file (sync_file_range), without waiting. The fsync that follows reports errors."""
    if _sync_file_range is not None:
        _sync_file_range(descriptor, ctypes.c_int64(offset), ctypes.c_int64(nbytes), _SYNC_FILE_RANGE_WRITE)


def await_writeback(descriptor: int, offset: int, nbytes: int) -> None:
    """Wait until a stretch of a file is written to the disk (sync_file_range). Errors are ignored, as above."""
    if _sync_file_range is not None:
        _sync_file_range(descriptor, ctypes.c_int64(offset), ctypes.c_int64(nbytes), _SYNC_FILE_RANGE_WRITE_AND_WAIT)


def finish_writeback(descriptor: int, offset: int, nbytes: int) -> None:
    """Wait until a stretch of a file is written, which does not make it durable. Raises OSError, as an fsync does."""
    if _sync_file_range is None:
        os.fsync(descriptor)
    elif _sync_file_range(descriptor, ctypes.c_int64(offset), ctypes.c_int64(nbytes), _SYNC_FILE_RANGE_ALL) != 0:
        if (code := ctypes.get_errno()) not in (errno.EINVAL, errno.ENOSYS, errno.ESPIPE):
            raise OSError(code, os.strerror(code))  # It is reported once: an fsync would not tell it again.
        os.fsync(descriptor)


def drop_from_cache(descriptor: int, offset: int = 0, nbytes: int = 0) -> None:
    """Drop the clean pages of a stretch of a file from the page cache; 0 bytes: up to the end of the file."""
    try:
        os.posix_fadvise(descriptor, offset, nbytes, os.POSIX_FADV_DONTNEED)
    except OSError:
        pass  # Advice only.


def write_all(descriptor: int, content: memoryview | bytes, offset: int) -> None:
    """Write all of `content` from byte `offset` on, in several calls after a short write."""
    rest = memoryview(content)
    while len(rest):
        count = os.pwrite(descriptor, rest, offset)
        if not count:
            raise OSError(errno.EIO, "a write returned 0 bytes")
        rest, offset = rest[count:], offset + count


def sync_folder(path: Path | str, below: Folder | None = None) -> None:
    """Make the names in a folder durable; `path` is relative to `below` if that is given. EINVAL is ignored: file
    systems that cannot sync a folder return it."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    descriptor = os.open(path, flags, dir_fd=below.descriptor if below else None)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)


def sync_names(below: Folder, paths: Iterable[str]) -> None:
    """Make the names of these files and folders durable, by one sync of each folder that holds some of them. `paths`
    are relative to `below`. Raises DestinationError or ResourceError."""
    for path in dict.fromkeys(path.rpartition("/")[0] or "." for path in paths):
        try:
            sync_folder(path, below)
        except OSError as error:
            raise target_error(below.path / path, error) from error


def make_folder(path: Path, mode: int = 0o777) -> None:
    """Make a folder and the missing folders above it, durably. The umask takes away from `mode`."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(mode, parents=True, exist_ok=True)
    for folder in missing:
        sync_folder(folder.parent)


def exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; False if the file system or the C library cannot."""
    if _renameat2 is None:
        return False
    at_fdcwd, rename_exchange = -100, 2
    if _renameat2(at_fdcwd, os.fsencode(one), at_fdcwd, os.fsencode(other), rename_exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EXDEV):
        return False
    raise OSError(code, os.strerror(code), str(one))
