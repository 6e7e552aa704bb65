"""Moving one parameter into the files of a job: in stretches where both sides have it in one piece, else in blocks.

A block is read once; its pieces are written to every file that wants some of them, in the order of that file.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from stream_reshard.casts import cast
from stream_reshard.header import StoredTensor
from stream_reshard.layouts.base import Fill, Slice, offset_in, strides_of
from stream_reshard.pipeline import Pipeline
from stream_reshard.stop import Stop
from stream_reshard.target_file import NewTensorFile
from stream_reshard.tensor_file import SourceFile
from stream_reshard.transfer import Part, Step, Window, run_length, runs, steps, whole_step

MIN_PIECE_NBYTES = 1024
"""Below this a strided copy in memory beats gathering the pieces (and keeps the list of pieces short)."""


@dataclass(frozen=True)
class OpenFiles:
    """What a job works with while it moves bytes."""

    sources: Mapping[str, SourceFile]
    """By path, as in the slices."""
    targets: Mapping[str, NewTensorFile]
    pipeline: Pipeline
    stop: Stop


@dataclass(frozen=True)
class Moved:
    """Bytes of tensors that were written, by the way they took."""

    shared: int = 0
    """Blocks that are now the source's too."""
    copied: int = 0
    """In stretches as long as the source has them."""
    strided: int = 0
    """Cut into pieces, put in another order, or cast."""

    def __add__(self, other: Moved) -> Moved:
        return Moved(self.shared + other.shared, self.copied + other.copied, self.strided + other.strided)

    def with_shared(self, nbytes: int) -> Moved:
        """The same, of which so many bytes that seemed to be copied are shared."""
        return Moved(self.shared + nbytes, self.copied - nbytes, self.strided)


def move(held: Sequence[Slice], wanted: Sequence[Slice], files: OpenFiles) -> Moved:
    """Bring one parameter from where it is held to where it is wanted. It is there once the pipeline is drained; what
    is shared counts as copied here."""
    if not wanted:
        return Moved()
    source, target = held[0].tensor, wanted[0].tensor
    whole = whole_step(held, wanted)
    nbytes = sum(part.num_elements for part in whole.parts) * target.itemsize
    if source.dtype == target.dtype and all(part.is_stretch for part in whole.parts):
        for part in whole.parts:
            _take(part, whole.windows[part.window], files)
        return Moved(copied=nbytes)
    for step in steps(held, wanted, len(files.pipeline.scratch) // max(source.itemsize, target.itemsize)):
        files.stop.check()
        _run_step(step, files)
    return Moved(strided=nbytes)


def _take(part: Part, window: Window, files: OpenFiles) -> None:
    """Bring a stretch to its place."""
    source, target = files.sources[window.slice.tensor.file], files.targets[part.target.tensor.file]
    itemsize, scratch = part.target.tensor.itemsize, files.pipeline.scratch
    source_offset = window.offset + part.window_offset * itemsize
    offset = part.target.tensor.begin + part.target_offset * itemsize
    end = offset + part.num_elements * itemsize
    if target.transport.passes_by:
        files.pipeline.write(partial(target.take, source, source_offset, offset, end - offset, scratch,
                                     files.stop.check))
        return
    for at in range(offset, end, len(scratch)):
        files.stop.check()
        place, size = source_offset + at - offset, min(len(scratch), end - at)
        if source.is_mapped:
            pieces = [source.view(place, size)]
        else:
            pieces = [files.pipeline.buffer()[:size]]
            source.read_into(pieces[0], place)
        files.pipeline.write(partial(_write_block, target, source, place, at, pieces))


def _write_block(target: NewTensorFile, source: SourceFile, source_offset: int, offset: int,
                 pieces: list[memoryview]) -> None:
    if source.is_mapped:
        target.write_mapped([source], offset, pieces)
    else:
        target.write(offset, pieces)
    source.release(source_offset, len(pieces[0]))


def _run_step(step: Step, files: OpenFiles) -> None:
    """Read the windows of a block; the assistant writes each target tensor's share of it, and gives them back."""
    by_target: dict[StoredTensor, list[Part]] = {}
    for part in step.parts:
        by_target.setdefault(part.target.tensor, []).append(part)
    is_mapped = _can_be_mapped(step, by_target, files)
    windows = _mapped(step, files) if is_mapped else _read(step, files)
    files.pipeline.write(partial(_write_shares, step, by_target, windows, is_mapped, files))


def _write_shares(step: Step, by_target: Mapping[StoredTensor, list[Part]], windows: list[memoryview], is_mapped: bool,
                  files: OpenFiles) -> None:
    dtype = step.parts[0].target.tensor.dtype
    if not is_mapped:
        windows = [cast(view, window.slice.tensor.dtype, dtype) for view, window in zip(windows, step.windows)]
    for tensor, parts in by_target.items():
        target = files.targets[tensor.file]
        for offset, pieces in _pieces(parts, windows, tensor.itemsize, files.pipeline.scratch):
            if is_mapped:
                target.write_mapped(files.sources.values(), tensor.begin + offset, pieces)
            else:
                target.write(tensor.begin + offset, pieces)
    for window in step.windows:
        files.sources[window.slice.tensor.file].release(window.offset, window.nbytes)


def _can_be_mapped(step: Step, by_target: dict[StoredTensor, list[Part]], files: OpenFiles) -> bool:
    """Whether the kernel alone touches the mapping: nothing is cast, nothing is put in order first."""
    dtype = step.parts[0].target.tensor.dtype
    return (all(files.sources[window.slice.tensor.file].is_mapped and window.slice.tensor.dtype == dtype
                for window in step.windows)
            and all(map(_can_be_gathered, by_target.values())))


def _mapped(step: Step, files: OpenFiles) -> list[memoryview]:
    return [files.sources[window.slice.tensor.file].view(window.offset, window.nbytes) for window in step.windows]


def _read(step: Step, files: OpenFiles) -> list[memoryview]:
    """The windows, one behind the other in a buffer."""
    buffer, windows, begin = files.pipeline.buffer(), [], 0
    for window in step.windows:
        windows.append(buffer[begin:begin + window.nbytes])
        files.sources[window.slice.tensor.file].read_into(windows[-1], window.offset)
        begin += window.nbytes
    return windows


def _can_be_gathered(parts: Sequence[Part]) -> bool:
    """Whether the pieces are long enough to be written from where they stand."""
    return all(part.run * part.target.tensor.itemsize >= MIN_PIECE_NBYTES or part.is_stretch for part in parts)


def _pieces(parts: Sequence[Part], windows: Sequence[memoryview], itemsize: int,
            scratch: memoryview) -> Iterator[tuple[int, list[memoryview]]]:
    """(byte offset in the tensor, pieces) of every contiguous stretch that the parts cover, in the tensor's order."""
    if _can_be_gathered(parts):
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


def _gathered(part: Part, window: memoryview, itemsize: int) -> list[tuple[int, memoryview]]:
    """Views of the window's pieces, no byte copied."""
    nbytes = part.run * itemsize
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


def write_zeros(fill: Fill, files: OpenFiles) -> None:
    """Fill padding, where it stands in one of these files."""
    if fill.tensor.file in files.targets:
        files.pipeline.write(partial(_write_zeros, fill, files.targets[fill.tensor.file], files.pipeline.scratch))


def _write_zeros(fill: Fill, target: NewTensorFile, scratch: memoryview) -> None:
    tensor, zeros = fill.tensor, scratch[:2**20]
    offset = tensor.begin + offset_in(tensor.shape, fill.place.start) * tensor.itemsize
    end = offset + fill.place.num_elements * tensor.itemsize
    zeros[:] = bytes(len(zeros))
    while offset < end:
        view = zeros[:end - offset]
        target.write(offset, [view])
        offset += len(view)
