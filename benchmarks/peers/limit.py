"""The limit itself: the same bytes, file for file, in a bare loop without plan, digests or checks.

`--to OUT` copies one folder, durably; without it the folders are only read, as a comparison has to. Bytes are read
ahead, each piece is written while the next is read, and given back to the kernel at once: without any one of these the
loop measured slower.
"""
from __future__ import annotations

import argparse
import mmap
import os
import resource
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from stream_reshard.storage.durable import await_writeback, drop_from_cache, fallocate, start_writeback
from stream_reshard.storage.read_ahead import ReadAhead, window_on

_PIECE_NBYTES, _NUM_BUFFERS = 4 * 2**20, 4
_NUM_WAITING = 16
"""Pieces that were written and may not be on the disk yet."""


class Ring:
    """Buffers that take turns; one is free again once the write that was given to it is done."""

    def __init__(self) -> None:
        self._buffers = [memoryview(mmap.mmap(-1, _PIECE_NBYTES)) for _ in range(_NUM_BUFFERS)]
        self._writes: list[Future[None] | None] = [None] * _NUM_BUFFERS
        self._next = 0

    def pieces(self, path: Path) -> Iterator[tuple[int, memoryview]]:
        """(offset, bytes) of a file, piece by piece."""
        with open(path, "rb", buffering=0) as stream:
            source, size = stream.fileno(), os.fstat(stream.fileno()).st_size
            ahead = ReadAhead(window_on(os.fstat(source).st_dev))
            for offset in range(0, size, _PIECE_NBYTES):
                if write := self._writes[self._next]:
                    write.result()
                piece = self._buffers[self._next][:size - offset]
                ahead.before_read(source, offset, len(piece))
                os.preadv(source, [piece], offset)
                drop_from_cache(source, offset, len(piece))
                yield offset, piece

    def give(self, write: Future[None]) -> None:
        """The piece that came last is being written; the next one comes in another buffer."""
        self._writes[self._next] = write
        self._next = (self._next + 1) % _NUM_BUFFERS


def files_below(folder: Path) -> Iterator[Path]:
    """The files, in the order of their names."""
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def read(folders: list[Path]) -> None:
    """Every byte, once."""
    ring = Ring()
    for folder in folders:
        for path in files_below(folder):
            for _ in ring.pieces(path):
                pass


def copy(folder: Path, output: Path) -> None:
    """Every file. Writing to the disk begins with each piece, and is waited for later, at last for all."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    ring, written, waiting = Ring(), [], deque[tuple[int, int, int]]()
    with ThreadPoolExecutor(1) as writer:
        for path in files_below(folder):
            target = output / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            written.append(writing := os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
            fallocate(writing, path.stat().st_size)
            for offset, piece in ring.pieces(path):
                ring.give(writer.submit(_write, writing, piece, offset, waiting))
    for writing in written:
        os.fsync(writing)


def _write(target: int, piece: memoryview, offset: int, waiting: deque[tuple[int, int, int]]) -> None:
    os.pwrite(target, piece, offset)
    start_writeback(target, offset, len(piece))
    waiting.append((target, offset, len(piece)))
    if len(waiting) > _NUM_WAITING:
        oldest = waiting.popleft()
        await_writeback(*oldest)
        drop_from_cache(*oldest)


def main() -> None:
    """Read, or copy."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--to", type=Path, metavar="OUT")
    arguments = parser.parse_args()
    if arguments.to:
        copy(arguments.folders[0], arguments.to)
    else:
        read(arguments.folders)


if __name__ == "__main__":
    main()
