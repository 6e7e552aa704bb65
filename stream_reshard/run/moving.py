"""Moving one parameter into the files of a job: unchanged where the plan is a plain copy, else rearranged in blocks.

A block is read once; its parts are written to each file in the order of that file.
"""
from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from stream_reshard.formats.layout import Fill, Slice, offset_in, strides_of
from stream_reshard.machine.stop import Stop
from stream_reshard.plan.blocks import Block, Part, Window, blocks, run_length, runs, whole_block
from stream_reshard.run.lanes import Writing
from stream_reshard.storage.header import StoredTensor
from stream_reshard.storage.source_file import SourceFile
from stream_reshard.storage.target_file import NewTensorFile


@dataclass(frozen=True)
class OpenFiles:
    """Open files, writes and stop request of a job."""

    sources: Mapping[str, SourceFile]
    """The source files of one parameter, by path."""
    targets: Mapping[str, NewTensorFile]
    """The files of the job, by path."""
    writing: Writing
    stop: Stop


@dataclass(frozen=True)
class Moved:
    """Bytes of tensors that a job or a run has written: cloned, copied, rearranged."""

    cloned: int = 0
    """Bytes in blocks shared with the source."""
    copied: int = 0
    """Bytes moved unchanged."""
    strided: int = 0
    """Bytes rearranged: moved piece by piece, or cast."""
    num_overflowed: int = 0
    """Weights too large for the target dtype; a cast made them infinite."""

    def __add__(self, other: Moved) -> Moved:
        return Moved(self.cloned + other.cloned, self.copied + other.copied, self.strided + other.strided,
                     self.num_overflowed + other.num_overflowed)

    def corrected_by(self, targets: Iterable[NewTensorFile]) -> Moved:
        """Corrected by the counts of the files: copied bytes that were cloned instead, and overflowed casts."""
        files = list(targets)
        cloned, overflowed = sum(file.cloned_nbytes for file in files), sum(file.num_overflowed for file in files)
        return Moved(self.cloned + cloned, self.copied - cloned, self.strided, self.num_overflowed + overflowed)


def move(sources: Sequence[Slice], targets: Sequence[Slice], files: OpenFiles) -> Moved:
    """Give the writes of one parameter to the lane's assistant. Bytes that will be cloned are counted as copied."""
    if not targets:
        return Moved()
    source, target = sources[0].tensor, targets[0].tensor
    whole, transport = whole_block(sources, targets), files.targets[target.file].transport
    nbytes = sum(part.nbytes for part in whole.parts)
    if not whole.is_plain_copy:
        block_nbytes = len(files.writing.lane.scratch)
        for block in blocks(sources, targets, block_nbytes // max(source.itemsize, target.itemsize)):
            files.stop.check()
            files.writing.write(partial(_write_parts, block, _read(block, files), files))
        return Moved(strided=nbytes)
    if transport.bypasses_process or transport.is_mapped:
        for part in whole.parts:
            _take(part, whole.windows[part.window], files)
    else:
        for index, window in enumerate(whole.windows):
            _copy(window, [part for part in whole.parts if part.window == index], files)
    return Moved(copied=nbytes)


def _copy(window: Window, parts: Sequence[Part], files: OpenFiles) -> None:
    """Read a window in blocks, and write the bytes that each block holds for each part."""
    source = files.sources[window.slice.tensor.file]
    offsets = [window.offset_of(part) - window.offset for part in parts]
    stretches = [(first, first + part.nbytes, files.targets[part.target.tensor.file], part.offset)
                 for first, part in zip(offsets, parts)]
    for begin in range(0, window.nbytes, len(files.writing.lane.scratch)):
        files.stop.check()
        view = files.writing.lane.buffer()[:window.nbytes - begin]
        source.read_into(view, window.offset + begin)
        end = begin + len(view)
        pieces = [(target, offset + max(first, begin) - first, view[max(first, begin) - begin:min(last, end) - begin])
                  for first, last, target, offset in stretches if first < end and last > begin]
        files.writing.write(partial(_write_pieces, pieces, source, window.offset + begin, len(view)))


def _write_pieces(pieces: Sequence[tuple[NewTensorFile, int, memoryview]], source: SourceFile, source_offset: int,
                  nbytes: int) -> None:
    for target, offset, piece in pieces:
        target.write(offset, [piece])
    source.release(source_offset, nbytes)


def _take(part: Part, window: Window, files: OpenFiles) -> None:
    """Clone a part, let the file system copy it, or write it from a mapping: it passes through no buffer."""
    source, target = files.sources[window.slice.tensor.file], files.targets[part.target.tensor.file]
    take = target.take if target.transport.bypasses_process else target.take_mapped
    files.writing.write(partial(take, source, window.offset_of(part), part.offset, part.nbytes,
                                files.writing.lane.scratch, files.stop.check), reads=False)


def _write_parts(block: Block, views: Sequence[memoryview], files: OpenFiles) -> None:
    windows = _cast(block, views, files)
    by_target: dict[StoredTensor, list[Part]] = {}
    for part in block.parts:
        by_target.setdefault(part.target.tensor, []).append(part)
    for tensor, parts in by_target.items():
        for offset, pieces in _joined(_pieces(parts, windows, tensor.itemsize, files.writing.lane.scratch)):
            files.targets[tensor.file].write(tensor.begin + offset, pieces)
    for window in block.windows:
        files.sources[window.slice.tensor.file].release(window.offset, window.nbytes)


def _cast(block: Block, views: Sequence[memoryview], files: OpenFiles) -> list[memoryview]:
    """The windows in the dtype of the targets: themselves, or one after the other in a buffer."""
    from stream_reshard.storage.casts import cast, num_overflowed
    target, results, begin = block.parts[0].target.tensor, list(views), 0
    for index, (view, window) in enumerate(zip(views, block.windows)):
        if (source := window.slice.tensor).dtype != target.dtype:
            end = begin + len(view) // source.itemsize * target.itemsize
            results[index] = files.writing.lane.results[begin:end]
            cast(view, source.dtype, results[index], target.dtype)
            files.targets[target.file].num_overflowed += num_overflowed(
                view, source.dtype, results[index], target.dtype, window.shape, window.slice.strides)
            begin = end
    return results


def _read(block: Block, files: OpenFiles) -> list[memoryview]:
    """The bytes of the windows, one window after the other in a buffer."""
    buffer, views, begin = files.writing.lane.buffer(), [], 0
    for window in block.windows:
        views.append(buffer[begin:begin + window.nbytes])
        assert len(views[-1]) == window.nbytes, "the windows of a block fit into a buffer"
        files.sources[window.slice.tensor.file].read_into(views[-1], window.offset)
        begin += window.nbytes
    return views


def _pieces(parts: Sequence[Part], windows: Sequence[memoryview], itemsize: int,
            scratch: memoryview) -> Iterator[tuple[int, memoryview]]:
    """(byte offset in the target tensor, bytes) of the parts for one target tensor, in its order.

    Contiguous parts are views of the windows. Other parts are copied into `scratch` in the order of the target, which
    is cheaper than to digest and write many small pieces.
    """
    start, stop = min(part.target_offset for part in parts), max(part.target_stop for part in parts)
    if all(part.is_contiguous for part in parts):
        for part in sorted(parts, key=lambda part: part.target_offset):
            begin = part.window_offset * itemsize
            yield part.target_offset * itemsize, windows[part.window][begin:begin + part.num_elements * itemsize]
    elif stop - start == sum(part.num_elements for part in parts):  # Together they leave no gap.
        for part in parts:
            _arrange(part, windows[part.window], scratch[(part.target_offset - start) * itemsize:], part.target_strides)
        yield start * itemsize, scratch[:(stop - start) * itemsize]
    else:
        yield from _scattered(parts, windows, itemsize, scratch)


def _scattered(parts: Sequence[Part], windows: Sequence[memoryview], itemsize: int,
               scratch: memoryview) -> Iterator[tuple[int, memoryview]]:
    """(byte offset in the target tensor, bytes) of parts with elements of other blocks between them: each part is
    arranged by itself, and yielded run by run."""
    begin = 0
    for part in sorted(parts, key=lambda part: part.target_offset):
        strides = strides_of(part.shape)
        arranged = scratch[begin:begin + part.num_elements * itemsize]
        _arrange(part, windows[part.window], arranged, strides)
        begin += len(arranged)
        length = run_length(part.shape, part.target_strides, strides) * itemsize
        for target, own in runs(part.shape, part.target_strides, strides):
            yield (part.target_offset + target) * itemsize, arranged[own * itemsize:own * itemsize + length]


def _arrange(part: Part, window: memoryview, arranged: memoryview, strides: Sequence[int]) -> None:
    """Copy a part from its window to `arranged`, where its elements have these strides."""
    import numpy as np
    itemsize = part.target.tensor.itemsize

    def view(memory: memoryview, start: int, steps: Sequence[int]) -> np.ndarray:
        elements: np.ndarray = np.ndarray(part.shape, f"u{itemsize}", memory, start * itemsize,
                                          [step * itemsize for step in steps])
        return elements

    np.copyto(view(arranged, 0, strides), view(window, part.window_offset, part.window_strides))


def _joined(pieces: Iterable[tuple[int, memoryview]]) -> Iterator[tuple[int, list[memoryview]]]:
    """(byte offset in the tensor, pieces) of every contiguous stretch of pieces."""
    stretch: list[memoryview] = []
    begin = end = -1
    for offset, piece in pieces:
        if offset != end:
            if stretch:
                yield begin, stretch
            stretch, begin = [], offset
        stretch.append(piece)
        end = offset + len(piece)
    if stretch:
        yield begin, stretch


def write_zeros(fill: Fill, files: OpenFiles) -> None:
    """Write the zeros of padding, if its file is one of the job's."""
    if fill.tensor.file in files.targets:
        files.writing.write(partial(_write_zeros, fill, files.targets[fill.tensor.file], files.writing.lane.scratch),
                            reads=False)


def _write_zeros(fill: Fill, target: NewTensorFile, scratch: memoryview) -> None:
    tensor, zeros = fill.tensor, scratch[:2**20]
    offset = tensor.begin + offset_in(tensor.shape, fill.place.start) * tensor.itemsize
    end = offset + fill.place.num_elements * tensor.itemsize
    zeros[:] = bytes(len(zeros))
    while offset < end:
        view = zeros[:end - offset]
        target.write(offset, [view])
        offset += len(view)
