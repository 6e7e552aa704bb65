"""Moving one parameter into the files of a job: in stretches where both sides have it in one piece, else in blocks.

A block is read once; its pieces are written to every file that wants some of them, in the order of that file.
"""
from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from stream_reshard.formats.layout import Fill, Slice, offset_in, strides_of
from stream_reshard.machine.stop import Stop
from stream_reshard.plan.blocks import Block, Part, Window, blocks, run_length, runs, whole_block
from stream_reshard.run.lanes import Writing
from stream_reshard.storage.dtypes import cast, num_overflowed
from stream_reshard.storage.header import StoredTensor
from stream_reshard.storage.source_file import SourceFile
from stream_reshard.storage.target_file import NewTensorFile


@dataclass(frozen=True)
class OpenFiles:
    """Files, writes and stop request of a job that moves bytes."""

    sources: Mapping[str, SourceFile]
    """By path, as in the slices."""
    targets: Mapping[str, NewTensorFile]
    writing: Writing
    stop: Stop


@dataclass(frozen=True)
class Moved:
    """Bytes of tensors that were written, by the way they took."""

    cloned: int = 0
    """Blocks that are now the source's too."""
    copied: int = 0
    """In stretches as long as the source has them."""
    strided: int = 0
    """Cut into pieces, put in another order, or cast."""
    num_overflowed: int = 0
    """Weights that were too large for the dtype they were cast to, and are infinite now."""

    def __add__(self, other: Moved) -> Moved:
        return Moved(self.cloned + other.cloned, self.copied + other.copied, self.strided + other.strided,
                     self.num_overflowed + other.num_overflowed)

    def corrected_by(self, targets: Iterable[NewTensorFile]) -> Moved:
        """Corrected by what the files counted: copied bytes that turned out to be cloned, overflowed casts."""
        files = list(targets)
        cloned, overflowed = sum(file.cloned_nbytes for file in files), sum(file.num_overflowed for file in files)
        return Moved(self.cloned + cloned, self.copied - cloned, self.strided, self.num_overflowed + overflowed)


def move(held: Sequence[Slice], wanted: Sequence[Slice], files: OpenFiles) -> Moved:
    """Bring one parameter from where it is held to where it is wanted. It is there once all is written; what is cloned
    counts as copied here."""
    if not wanted:
        return Moved()
    source, target = held[0].tensor, wanted[0].tensor
    whole, transport = whole_block(held, wanted), files.targets[target.file].transport
    nbytes = sum(part.num_elements for part in whole.parts) * target.itemsize
    if whole.is_plain_copy and (transport.bypasses_process or transport.is_mapped):
        for part in whole.parts:
            _take(part, whole.windows[part.window], files)
    elif whole.is_plain_copy:
        for index, window in enumerate(whole.windows):
            _copy(window, [part for part in whole.parts if part.window == index], files)
    else:
        block_nbytes = len(files.writing.lane.scratch)
        for block in blocks(held, wanted, block_nbytes // max(source.itemsize, target.itemsize)):
            files.stop.check()
            files.writing.write(partial(_write_parts, block, _read(block, files), files))
    return Moved(copied=nbytes) if whole.is_plain_copy else Moved(strided=nbytes)


def _copy(window: Window, parts: Sequence[Part], files: OpenFiles) -> None:
    """Read a window in blocks, and write what each block has of each stretch."""
    source = files.sources[window.slice.tensor.file]
    firsts = [window.offset_of(part) - window.offset for part in parts]
    stretches = [(first, first + part.nbytes, files.targets[part.target.tensor.file], part.offset)
                 for first, part in zip(firsts, parts)]
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
    """Bring a stretch to its place without reading it."""
    source, target = files.sources[window.slice.tensor.file], files.targets[part.target.tensor.file]
    take = target.take if target.transport.bypasses_process else target.take_mapped
    files.writing.write(partial(take, source, window.offset_of(part), part.offset, part.nbytes,
                                files.writing.lane.scratch, files.stop.check), reads=False)


def _write_parts(block: Block, views: Sequence[memoryview], files: OpenFiles) -> None:
    dtype = block.parts[0].target.tensor.dtype
    windows = [cast(view, window.slice.tensor.dtype, dtype) for view, window in zip(views, block.windows)]
    files.targets[block.parts[0].target.tensor.file].num_overflowed += sum(
        num_overflowed(before, window.slice.tensor.dtype, after, dtype)
        for before, window, after in zip(views, block.windows, windows))
    by_target: dict[StoredTensor, list[Part]] = {}
    for part in block.parts:
        by_target.setdefault(part.target.tensor, []).append(part)
    for tensor, parts in by_target.items():
        for offset, pieces in _joined(_pieces(parts, windows, tensor.itemsize, files.writing.lane.scratch)):
            files.targets[tensor.file].write(tensor.begin + offset, pieces)
    for window in block.windows:
        files.sources[window.slice.tensor.file].release(window.offset, window.nbytes)


def _read(block: Block, files: OpenFiles) -> list[memoryview]:
    """The windows, one behind the other in a buffer."""
    buffer, windows, begin = files.writing.lane.buffer(), [], 0
    for window in block.windows:
        windows.append(buffer[begin:begin + window.nbytes])
        assert len(windows[-1]) == window.nbytes, "the windows of a block fit into a buffer"
        files.sources[window.slice.tensor.file].read_into(windows[-1], window.offset)
        begin += window.nbytes
    return windows


def _pieces(parts: Sequence[Part], windows: Sequence[memoryview], itemsize: int,
            scratch: memoryview) -> Iterator[tuple[int, memoryview]]:
    """(byte offset in the tensor, bytes), in the tensor's order: from where they stand if they stand in order there,
    else put in order in `scratch` by strided copies. That is cheaper than to digest and gather small pieces."""
    first, last = min(part.target_offset for part in parts), max(part.target_end for part in parts)
    if all(part.is_contiguous for part in parts):
        for part in sorted(parts, key=lambda part: part.target_offset):
            begin = part.window_offset * itemsize
            yield part.target_offset * itemsize, windows[part.window][begin:begin + part.num_elements * itemsize]
    elif last - first == sum(part.num_elements for part in parts):  # Together they leave no gap.
        for part in parts:
            _arrange(part, windows[part.window], scratch[(part.target_offset - first) * itemsize:], part.target_strides)
        yield first * itemsize, scratch[:(last - first) * itemsize]
    else:
        yield from _scattered(parts, windows, itemsize, scratch)


def _scattered(parts: Sequence[Part], windows: Sequence[memoryview], itemsize: int,
               scratch: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The same for parts between which something of other blocks stands: each in order, run by run."""
    begin = 0
    for part in sorted(parts, key=lambda part: part.target_offset):
        own = strides_of(part.shape)
        arranged = scratch[begin:begin + part.num_elements * itemsize]
        _arrange(part, windows[part.window], arranged, own)
        begin += len(arranged)
        length = run_length(part.shape, part.target_strides, own) * itemsize
        for there, here in runs(part.shape, part.target_strides, own):
            yield (part.target_offset + there) * itemsize, arranged[here * itemsize:here * itemsize + length]


def _arrange(part: Part, window: memoryview, arranged: memoryview, strides: Sequence[int]) -> None:
    """Copy a part out of its window to where its elements stand under these strides, from the begin of `arranged`."""
    import numpy as np
    itemsize = part.target.tensor.itemsize

    def view(memory: memoryview, first: int, steps: Sequence[int]) -> np.ndarray:
        found: np.ndarray = np.ndarray(part.shape, f"u{itemsize}", memory, first * itemsize,
                                       [step * itemsize for step in steps])
        return found

    np.copyto(view(arranged, 0, strides), view(window, part.window_offset, part.window_strides))


def _joined(pieces: Iterable[tuple[int, memoryview]]) -> Iterator[tuple[int, list[memoryview]]]:
    """(byte offset in the tensor, pieces) of every contiguous stretch that the pieces make up."""
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
    """Fill padding, where it stands in one of these files."""
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
