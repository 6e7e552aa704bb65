"""Reading and writing the bytes of tensor files: the only module that opens them. How bytes move is decided here.

Order of a write, so that a file under its final name is always whole: a unique temp name in the same folder (one that
no loader's pattern matches), exclusive create, final size, header, blocks, fsync, rename. Folders are synced at the
end.
"""
from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import xxhash

from stream_reshard.errors import ResourceError, SourceError, StreamReshardError, quoted
from stream_reshard.header import StoredTensor, TensorFile, header_of

MAX_PIECES = 1024
"""Pieces one gathered write may have (IOV_MAX on Linux)."""


def target_error(path: Path, error: OSError) -> StreamReshardError:
    """The error a user sees when the destination cannot be written."""
    cure = "; free some space and run the same command again" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    return ResourceError(f"{quoted(path)}: {error.strerror}{cure}")


class SourceFile:
    """A tensor file opened for reading, with positioned reads: safe to share, and a file that shrank is an error
    instead of a signal."""

    def __init__(self, root: Path, path: str):
        self.path = path
        try:
            self.descriptor = os.open(root / path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise SourceError(f"{quoted(path)}: {error.strerror}") from error

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill `view` with the bytes from `offset` on. Raises SourceError when there are fewer."""
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self.descriptor, [view[done:]], offset + done)
            except OSError as error:
                raise SourceError(f"{quoted(self.path)}: {error.strerror} at byte {offset + done}") from error
            if not count:
                raise SourceError(f"{quoted(self.path)} shrank during the run: it ends before byte "
                                  f"{offset + len(view)}; nothing was committed")
            done += count

    def close(self) -> None:
        """Give the descriptor back."""
        os.close(self.descriptor)


class TargetFile:
    """A tensor file being written. As a context manager it leaves a whole file under its final name, or nothing."""

    def __init__(self, root: Path, file: TensorFile):
        self.file = file
        self.final = root / file.path
        self.temp = self.final.with_name(f".{self.final.name}.{uuid.uuid4().hex[:12]}.part")
        self.digest = xxhash.xxh3_128()
        self._position = 0
        """Past the last byte digested; -1 once writes came out of order."""
        try:
            self.final.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            self.descriptor = os.open(self.temp, flags, 0o666)
        except OSError as error:
            raise target_error(self.final, error) from error

    def __enter__(self) -> TargetFile:
        try:
            self._reserve()
            self.write(0, [memoryview(header_of(self.file))])
        except BaseException:
            self.abandon()
            raise
        return self

    def _reserve(self) -> None:
        """Take the final size at once, so that a full disk shows itself before the work; not all file systems can."""
        try:
            os.posix_fallocate(self.descriptor, 0, self.file.nbytes)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise target_error(self.final, error) from error

    def write(self, offset: int, pieces: Sequence[memoryview]) -> None:
        """Write the pieces one behind the other from byte `offset` on."""
        for first in range(0, len(pieces), MAX_PIECES):
            offset = self._gather(offset, pieces[first:first + MAX_PIECES])

    def _gather(self, offset: int, pieces: Sequence[memoryview]) -> int:
        if offset == self._position:
            for piece in pieces:
                self.digest.update(piece)
        else:
            self._position = -1
        end = offset + sum(map(len, pieces))
        try:
            done = os.pwritev(self.descriptor, pieces, offset)
            if done < end - offset:
                self._finish_short_write(offset + done, pieces, done)
        except OSError as error:
            raise target_error(self.final, error) from error
        if self._position >= 0:
            self._position = end
        return end

    def _finish_short_write(self, offset: int, pieces: Sequence[memoryview], done: int) -> None:
        for piece in pieces:
            rest, done = piece[done:], max(0, done - len(piece))
            while len(rest):
                count = os.pwrite(self.descriptor, rest, offset)
                if not count:
                    raise OSError(errno.EIO, "nothing could be written")
                rest, offset = rest[count:], offset + count

    def _digest_again(self, buffer: memoryview) -> None:
        """Digest the file as it stands, for writes that did not come in its order."""
        self.digest.reset()
        for offset in range(0, self.file.nbytes, len(buffer)):
            view = buffer[:min(len(buffer), self.file.nbytes - offset)]
            if os.preadv(self.descriptor, [view], offset) != len(view):
                raise OSError(errno.EIO, "what was written cannot be read back")
            self.digest.update(view)

    def commit(self, buffer: memoryview) -> str:
        """Make the file durable under its final name; returns its xxh3_128 digest, in hex."""
        try:
            if self._position != self.file.nbytes:
                self._digest_again(buffer)
            os.fsync(self.descriptor)
            os.close(self.descriptor)
            self.descriptor = -1
            os.rename(self.temp, self.final)
        except OSError as error:
            raise target_error(self.final, error) from error
        return self.digest.hexdigest()

    def abandon(self) -> None:
        """Remove what was written so far."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
        self.temp.unlink(missing_ok=True)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if self.descriptor >= 0 or kind is not None:
            self.abandon()


def same_bytes(root: Path, first: StoredTensor, second: StoredTensor, buffer_nbytes: int = 2**20) -> bool:
    """Whether two tensors of one checkpoint hold the same dtype, shape and bytes; reads both, in bounded memory."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    one, two = SourceFile(root, first.file), SourceFile(root, second.file)
    try:
        for offset in range(0, first.nbytes, buffer_nbytes):
            size = min(buffer_nbytes, first.nbytes - offset)
            views = memoryview(bytearray(size)), memoryview(bytearray(size))
            one.read_into(views[0], first.begin + offset)
            two.read_into(views[1], second.begin + offset)
            if views[0] != views[1]:
                return False
        return True
    finally:
        one.close()
        two.close()


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable. File systems that cannot say EINVAL, which is tolerated."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)
