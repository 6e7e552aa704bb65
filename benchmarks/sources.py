"""Synthetic sources: made once, kept while the suite runs, sized to the machine."""
from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import machine
from benchmarks.rounds import locked
from benchmarks.synthetic import SHAPES, write_source

NBYTES = {"llama-0.3b": 536 * 10**6, "llama-1.3b": 2691 * 10**6, "llama-2.7b": 5428 * 10**6,
          "llama-7b": 13477 * 10**6}
"""Size of each shape on disk, about, smallest first."""
_TENSOR_FILES = {".safetensors", ".pt"}


@dataclass(frozen=True)
class Source:
    """A folder of tensor files."""

    path: Path
    nbytes: int
    """Of its tensor files."""


def source_at(path: Path) -> Source:
    """The source in a folder."""
    return Source(path.resolve(), sum(file.stat().st_size for file in path.rglob("*") if file.suffix in _TENSOR_FILES))


@dataclass(frozen=True)
class Sources:
    """The sources below one folder; what is there already is used as it is, and kept."""

    root: Path
    lock: Path | None = None
    """Shared while a source is made."""
    made: list[Path] = field(default_factory=list)

    def get(self, shape: str) -> Source:
        """The source of this shape."""
        path = self.root / shape
        if not path.exists():
            with locked(self.lock, fcntl.LOCK_SH):
                self.made.append(path)
                write_source(path, SHAPES[shape])
        return source_at(path)

    def fitting(self, shapes: Sequence[str]) -> list[str]:
        """Those that are there or fit on the disk, all of them together and one output."""
        fitting, free = [], shutil.disk_usage(self.root).free * 0.9
        for shape in shapes:
            free -= 0 if (self.root / shape).exists() else NBYTES[shape]
            if free > NBYTES[shape]:
                fitting.append(shape)
        return fitting


@contextmanager
def sources_in(root: Path, lock: Path | None) -> Iterator[Sources]:
    """Sources that are removed at the end where they were made here."""
    root.mkdir(parents=True, exist_ok=True)
    sources = Sources(root, lock)
    try:
        yield sources
    finally:
        for path in sources.made:
            shutil.rmtree(path, ignore_errors=True)


_ROOM = {"training": (16, 40)}
"""Memory and disk that a section needs, as multiples of its source: a training is seven times its weights, three are
kept, and one peer holds two in memory, another two on the disk."""


def shape_for(section: str, scratch: Path, is_full: bool) -> str:
    """The shape of a section: 1.3 B, 7 B if full, where its most careless peer fits into memory and all of it on the
    disk; else 0.3 B. A full run of most sections takes what it gets."""
    big = "llama-7b" if is_full else "llama-1.3b"
    memory, disk = _ROOM.get(section, (0, 0) if is_full else (3, 5))
    fits = (machine.available() > memory * NBYTES[big] and shutil.disk_usage(scratch).free > disk * NBYTES[big])
    return big if fits else "llama-0.3b"
