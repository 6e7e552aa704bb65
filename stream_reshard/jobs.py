"""Running one job: read each block of its parameters once, write every file's share of it."""
from __future__ import annotations

import mmap
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from stream_reshard.casts import cast
from stream_reshard.durable import NewFile, WriteFault
from stream_reshard.header import StoredTensor
from stream_reshard.layouts.base import Fill, offset_in, strides_of
from stream_reshard.manifest import FileDone
from stream_reshard.plan import Job, Plan
from stream_reshard.stop import Stop
from stream_reshard.tensor_file import Identity, NewTensorFile, SourceFile, digest_of
from stream_reshard.transfer import Part, Step, run_length, runs, steps

MIN_PIECE_NBYTES = 1024
"""Below this a strided copy in memory beats gathering the pieces (and keeps the list of pieces short)."""

_local = threading.local()


@dataclass(frozen=True)
class Work:
    """What every job of a run needs to know. Picklable."""

    plan: Plan
    staging: Path
    """The folder under which the files grow."""
    block_nbytes: int
    """Size of one buffer; a job holds two."""
    identities: Mapping[str, Identity]
    """The source files as the plan saw them, by path."""
    done: Mapping[str, FileDone] = field(default_factory=dict)
    """Files that the journal of an earlier attempt names, by path."""
    stop: Stop = field(default_factory=Stop)


@dataclass(frozen=True)
class JobDone:
    """The files of a job, all durable."""

    files: tuple[FileDone, ...]
    was_kept: bool
    """Whether an earlier attempt had written them."""


def _buffers(nbytes: int) -> tuple[memoryview, memoryview]:
    """This thread's buffers: one for what was read, one for what must be put in order first. Touched as needed, and
    private: Python's default would let a forked process write into its parent's."""
    if getattr(_local, "nbytes", 0) != nbytes:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        _local.nbytes = nbytes
        _local.views = memoryview(mmap.mmap(-1, nbytes, flags)), memoryview(mmap.mmap(-1, nbytes, flags))
    return _local.views


def run_job(work: Work, job: Job) -> JobDone:
    """Write the files of one job, unless all are there as the journal says; returns them with their digests.

    Holds two blocks in memory. After an I/O error in a file of the destination the job is run once more: the kernel may
    have dropped what was written, and only the source can give it back.
    """
    if kept := _kept(work, job):
        return JobDone(kept, True)
    try:
        return JobDone(_written(work, job), False)
    except WriteFault:
        return JobDone(_written(work, job), False)


def _kept(work: Work, job: Job) -> tuple[FileDone, ...]:
    """The files of a job as an earlier attempt left them, read and compared with its journal; () where one differs."""
    found = []
    for file in job.files:
        done, path = work.done.get(file.path), work.staging / file.path
        if not (done and path.is_file() and path.stat().st_size == done.nbytes == file.nbytes):
            return ()
        if digest_of(work.staging, file.path, _buffers(work.block_nbytes)[0], work.stop) != done.xxh3_128:
            return ()
        found.append(done)
    return tuple(found)


def _written(work: Work, job: Job) -> tuple[FileDone, ...]:
    plan, views = work.plan, _buffers(work.block_nbytes)
    with ExitStack() as stack:
        targets = {file.path: stack.enter_context(NewTensorFile(work.staging, file)) for file in job.files}
        sources: dict[str, SourceFile] = {}
        for name in job.parameters:
            wanted = plan.targets_of(job, name)
            for path in dict.fromkeys(held.tensor.file for held in plan.source.slices[name]):
                if path not in sources:
                    sources[path] = stack.enter_context(
                        SourceFile(plan.source.root, path, work.identities.get(path)))
            if wanted:
                itemsize = max(plan.source.slices[name][0].tensor.itemsize, wanted[0].tensor.itemsize)
                for step in steps(plan.source.slices[name], wanted, work.block_nbytes // itemsize):
                    work.stop.check()
                    _run_step(step, sources, targets, views)
            for fill in plan.target.fills.get(name, ()):
                if fill.tensor.file in targets:
                    _write_zeros(fill, targets[fill.tensor.file], views[1])
        return tuple(FileDone(path, target.nbytes, target.commit(views[0])) for path, target in targets.items())


def _run_step(step: Step, sources: Mapping[str, SourceFile], targets: Mapping[str, NewFile],
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


def _write_zeros(fill: Fill, target: NewFile, buffer: memoryview) -> None:
    tensor = fill.tensor
    offset = tensor.begin + offset_in(tensor.shape, fill.place.start) * tensor.itemsize
    end = offset + fill.place.num_elements * tensor.itemsize
    size = min(len(buffer), 2**20)
    buffer[:size] = bytes(size)
    while offset < end:
        view = buffer[:min(size, end - offset)]
        target.write(offset, [view])
        offset += len(view)
