"""Cloning: blocks shared with the source instead of copied bytes. XFS, btrfs, bcachefs and NFS 4.2 can.

Source offset, target offset and length must be multiples of the block size; the kernel does not trim ragged edges. The
headers of target files are padded so that source and target offset are equal modulo the block size (`plan`); the edges
are copied. A trial decides if a file system can clone, never its name.
"""
from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Iterable
from pathlib import Path

from stream_reshard.storage.header import BLOCK_NBYTES, MIN_CLONED_NBYTES

_FICLONERANGE = 0x4020940D
_FILE_CLONE_RANGE = struct.Struct("=qQQQ")
"""struct file_clone_range: source descriptor, source offset, length, target offset (ioctl_ficlonerange(2))."""

_CANNOT = frozenset({errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EPERM,
                     errno.ETXTBSY, errno.EBADF, errno.EISDIR, errno.EMLINK})
"""errno values if these blocks cannot be cloned; a full or broken disk has others. EMLINK: a block has the
most owners that its file system can count."""


def clone(source: int, source_offset: int, target: int, offset: int, nbytes: int) -> bool:
    """Clone `nbytes` from byte `source_offset` on to byte `offset` of the target; False if that is impossible. All
    three numbers must be multiples of the block size. Raises OSError if the disk is full or broken."""
    try:
        fcntl.ioctl(target, _FICLONERANGE, _FILE_CLONE_RANGE.pack(source, source_offset, nbytes, offset))
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
        return False
    return True


def can_clone(source: Path, folder: Path) -> bool:
    """True if blocks of the file `source` can be cloned into `folder`; tried with a file without a name."""
    try:
        if os.stat(source).st_dev != os.stat(folder).st_dev or os.stat(source).st_size < BLOCK_NBYTES:
            return False
        reading = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
        try:
            writing = os.open(folder, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
            try:
                return clone(reading, 0, writing, 0, BLOCK_NBYTES)
            finally:
                os.close(writing)
        finally:
            os.close(reading)
    except OSError:
        return False


def can_clone_all(root: Path, paths: Iterable[str], folder: Path) -> bool:
    """True if blocks of every one of these files below `root` can be cloned into `folder`."""
    return all(can_clone(root / path, folder) for path in paths)


def inner_blocks(source_offset: int, offset: int, nbytes: int) -> tuple[int, int]:
    """(begin, end) of the whole blocks in a stretch of the target, bytes of the file. Both are the end of the stretch
    if the two offsets differ modulo the block size, or the blocks hold less than MIN_CLONED_NBYTES."""
    begin, end = -(-offset // BLOCK_NBYTES) * BLOCK_NBYTES, (offset + nbytes) // BLOCK_NBYTES * BLOCK_NBYTES
    if (source_offset - offset) % BLOCK_NBYTES or end - begin < MIN_CLONED_NBYTES:
        return offset + nbytes, offset + nbytes
    return begin, end
