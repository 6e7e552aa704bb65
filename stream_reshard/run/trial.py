"""A trial of the disks: bytes of the source are read by themselves, then copied in a lane as a run moves them.

The copy goes into a file without a name, in the folder that will hold the destination: it is gone when it is closed,
however the process ends. Bytes come from the disk: they leave the page cache before they are read. No more than a few
writes wait for the disk, so a slow one delays the end little.
"""
from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile

from stream_reshard.run.lanes import Lane
from stream_reshard.storage.durable import await_writeback, drop_from_cache, fallocate, start_writeback, write_all
from stream_reshard.storage.source_file import SourceFile

MAX_NBYTES = 2**28
"""Limit on the bytes of a trial: those that are read by themselves and those that are copied."""
MAX_SECONDS = 1.0
"""Limit on the time of a trial, but for the last writes."""
_PART_READ = 0.25
"""Part of both limits for reading by itself."""
_WAITING_NBYTES = 2**25
"""Bytes that were written and may not be on the disk yet."""


@dataclass(frozen=True)
class Stretch:
    """Bytes of a source file."""

    path: str
    begin: int
    nbytes: int


@dataclass(frozen=True)
class Rate:
    """Bytes moved in a time."""

    nbytes: int
    seconds: float

    @property
    def per_second(self) -> float:
        """Bytes per second."""
        return self.nbytes / max(self.seconds, 1e-9)


@dataclass(frozen=True)
class Trial:
    """The speed of the disks."""

    reading: Rate
    copying: Rate
    """Reading and writing at once, until everything is durable."""

    @property
    def nbytes(self) -> int:
        """Bytes that were read."""
        return self.reading.nbytes + self.copying.nbytes


def try_disks(open_source: Callable[[str], SourceFile], sizes: Sequence[tuple[str, int]], folder: Path,
              block_nbytes: int) -> Trial:
    """Measure the disk of the source and that of a folder. `sizes`: (path, bytes) of the source files, in the order in
    which a run reads them. Raises OSError where nothing can be written in the folder, SourceError or ResourceError
    where a file cannot be read."""
    stretches = list(_stretches(sizes, block_nbytes))
    num_read = math.ceil(len(stretches) * _PART_READ)
    to_copy = stretches[num_read:] or stretches
    with TemporaryFile(dir=folder, buffering=0) as file, closing(Lane(block_nbytes)) as lane:
        fallocate(file.fileno(), sum(stretch.nbytes for stretch in to_copy))
        _evict(lane, open_source, stretches)
        reading = _read(lane, open_source, stretches[:num_read])
        copying = _copied(lane, open_source, to_copy, file.fileno())
    return Trial(reading, copying)


def _stretches(sizes: Sequence[tuple[str, int]], block_nbytes: int) -> Iterator[Stretch]:
    """The first bytes of the source, as many as a trial may move, in blocks."""
    left = MAX_NBYTES
    for path, size in sizes:
        for begin in range(0, min(size, left), block_nbytes):
            yield Stretch(path, begin, min(block_nbytes, size - begin, left - begin))
        left -= min(size, left)


def _evict(lane: Lane, open_source: Callable[[str], SourceFile], stretches: Sequence[Stretch]) -> None:
    """Drop the stretches from the page cache, those of a file at once: it keeps a piece that is dropped by halves."""
    for path, end in {stretch.path: stretch.begin + stretch.nbytes for stretch in stretches}.items():
        with lane.source(path, partial(open_source, path)) as source:
            drop_from_cache(source.descriptor, 0, end)


def _read(lane: Lane, open_source: Callable[[str], SourceFile], stretches: Sequence[Stretch]) -> Rate:
    begin, nbytes = time.monotonic(), 0
    for view in _blocks(lane, open_source, stretches, begin + MAX_SECONDS * _PART_READ):
        nbytes += len(view)
    return Rate(nbytes, time.monotonic() - begin)


def _copied(lane: Lane, open_source: Callable[[str], SourceFile], stretches: Sequence[Stretch], target: int) -> Rate:
    begin, nbytes = time.monotonic(), 0
    writes = []
    for view in _blocks(lane, open_source, stretches, begin + MAX_SECONDS * (1 - _PART_READ)):
        writes.append(lane.submit(partial(_write, target, view, nbytes)))
        nbytes += len(view)
    for write in writes:
        write.result()
    os.fsync(target)
    return Rate(nbytes, time.monotonic() - begin)


def _blocks(lane: Lane, open_source: Callable[[str], SourceFile], stretches: Sequence[Stretch],
            deadline: float) -> Iterator[memoryview]:
    """The bytes of each stretch, read from the disk into the next buffer of the lane, until the time is up."""
    for stretch in stretches:
        view = lane.buffer()[:stretch.nbytes]
        with lane.source(stretch.path, partial(open_source, stretch.path)) as source:
            source.read_into(view, stretch.begin)
            source.release(stretch.begin, stretch.nbytes)
        yield view
        if time.monotonic() >= deadline:
            return


def _write(target: int, view: memoryview, offset: int) -> None:
    write_all(target, view, offset)
    start_writeback(target, offset, len(view))
    await_writeback(target, max(0, offset - _WAITING_NBYTES), len(view))
