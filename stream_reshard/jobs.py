"""Running one job: read each block of its parameters once, write every file's share of it."""
from __future__ import annotations

import mmap
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from stream_reshard.casts import cast
from stream_reshard.header import StoredTensor
from stream_reshard.layouts.base import Fill, offset_in, strides_of
from stream_reshard.plan import Job, Plan
from stream_reshard.tensor_file import SourceFile, TargetFile
from stream_reshard.transfer import Part, Step, run_length, runs, steps

MIN_PIECE_NBYTES = 1024
"""Below this a strided copy in memory beats gathering the pieces (and keeps the list of pieces short)."""

_local = threading.local()


@dataclass(frozen=True)
class FileDone:
    """A file that is durable under its final name."""

    path: str
    nbytes: int
    xxh3_128: str
    """Digest of the whole file, in hex."""


def _buffers(nbytes: int) -> tuple[memoryview, memoryview]:
    """This thread's buffers: one for what was read, one for what must be put in order first. Touched as needed."""
    if getattr(_local, "nbytes", 0) != nbytes:
        _local.nbytes = nbytes
        _local.views = memoryview(mmap.mmap(-1, nbytes)), memoryview(mmap.mmap(-1, nbytes))
    return _local.views


def run_job(plan: Plan, staging: Path, block_nbytes: int, job: Job) -> tuple[FileDone, ...]:
    """Write the files of one job; returns them with their digests. Holds two blocks in memory."""
    views = _buffers(block_nbytes)
    with ExitStack() as stack:
        sources: dict[str, SourceFile] = {}
        targets = {file.path: stack.enter_context(TargetFile(staging, file)) for file in job.files}
        for name in job.parameters:
            wanted = plan.targets_of(job, name)
            for held in plan.source.slices[name]:
                if held.tensor.file not in sources:
                    sources[held.tensor.file] = SourceFile(plan.source.root, held.tensor.file)
                    stack.callback(sources[held.tensor.file].close)
            if wanted:
                itemsize = max(plan.source.slices[name][0].tensor.itemsize, wanted[0].tensor.itemsize)
                for step in steps(plan.source.slices[name], wanted, block_nbytes // itemsize):
                    _run_step(step, sources, targets, views)
            for fill in plan.target.fills.get(name, ()):
                if fill.tensor.file in targets:
                    _write_zeros(fill, targets[fill.tensor.file], views[1])
        return tuple(FileDone(path, target.file.nbytes, target.commit(views[0])) for path, target in targets.items())


def _run_step(step: Step, sources: Mapping[str, SourceFile], targets: Mapping[str, TargetFile],
              views: tuple[memoryview, memoryview]) -> None:
    """Read the windows of a block, then write each target tensor's share of it."""
    dtype = step.parts[0].target.tensor.dtype
    windows, begin = [], 0
    for window in step.windows:
        tensor = window.slice.tensor
        view = views[0][begin:begin + (window.stop - window.start) * tensor.itemsize]
        sources[tensor.file].read_into(view, tensor.begin + window.start * tensor.itemsize)
        windows.append(cast(view, tensor.dtype, dtype))
        begin += len(view)
    by_target: dict[StoredTensor, list[Part]] = {}
    for part in step.parts:
        by_target.setdefault(part.target.tensor, []).append(part)
    for tensor, parts in by_target.items():
        for offset, pieces in _pieces(parts, windows, tensor.itemsize, views[1]):
            targets[tensor.file].write(tensor.begin + offset, pieces)


def _pieces(parts: Sequence[Part], windows: Sequence[memoryview], itemsize: int,
            scratch: memoryview) -> Iterator[tuple[int, list[memoryview]]]:
    """(byte offset in the tensor, pieces) of every contiguous stretch that the parts cover, in the tensor's order."""
    if all(_run(part) * itemsize >= MIN_PIECE_NBYTES or _run(part) == part.num_elements for part in parts):
        found = [piece for part in parts for piece in _gathered(part, windows[part.window], itemsize)]
        if len(parts) > 1:
            found.sort(key=lambda piece: piece[0])
    else:
        found = _arranged(parts, windows, itemsize, scratch)
    stretch: list[memoryview] = []
    begin = end = -1
    for offset, piece in found:
        if offset != end:
            if stretch:
                yield begin, stretch
            stretch, begin = [], offset
        stretch.append(piece)
        end = offset + len(piece)
    if stretch:
        yield begin, stretch


def _run(part: Part) -> int:
    return run_length(part.shape, part.target_strides, part.window_strides)


def _gathered(part: Part, window: memoryview, itemsize: int) -> list[tuple[int, memoryview]]:
    """Views of the window's pieces, no byte copied."""
    nbytes = _run(part) * itemsize
    target, first = part.target_offset * itemsize, part.window_offset * itemsize
    return [(target + a * itemsize, window[first + b * itemsize:first + b * itemsize + nbytes])
            for a, b in runs(part.shape, part.target_strides, part.window_strides)]


def _arranged(parts: Sequence[Part], windows: Sequence[memoryview], itemsize: int,
              scratch: memoryview) -> list[tuple[int, memoryview]]:
    """The parts put in the target's order in `scratch` by one strided copy each, then cut into whole stretches."""
    import numpy as np
    from numpy.lib.stride_tricks import as_strided
    found, begin = [], 0
    for part in sorted(parts, key=lambda part: part.target_offset):
        nbytes = part.num_elements * itemsize
        source = np.frombuffer(windows[part.window], dtype=f"V{itemsize}")[part.window_offset:]
        view = as_strided(source, part.shape, [step * itemsize for step in part.window_strides], writeable=False)
        target = np.frombuffer(scratch[begin:begin + nbytes], dtype=f"V{itemsize}").reshape(part.shape)
        np.copyto(target, view)
        # A stretch is what is contiguous in the target alone.
        own = strides_of(part.shape)
        length = run_length(part.shape, part.target_strides, own) * itemsize
        found += [((part.target_offset + a) * itemsize,
                   scratch[begin + b * itemsize:begin + b * itemsize + length])
                  for a, b in runs(part.shape, part.target_strides, own)]
        begin += nbytes
    found.sort(key=lambda piece: piece[0])
    return found


def _write_zeros(fill: Fill, target: TargetFile, buffer: memoryview) -> None:
    tensor = fill.tensor
    offset = tensor.begin + offset_in(tensor.shape, fill.place.start) * tensor.itemsize
    end = offset + fill.place.num_elements * tensor.itemsize
    size = min(len(buffer), 2**20)
    buffer[:size] = bytes(size)
    while offset < end:
        view = buffer[:min(size, end - offset)]
        target.write(offset, [view])
        offset += len(view)
