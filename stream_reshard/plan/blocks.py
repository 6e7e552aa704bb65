"""One block of a parameter: the windows that are read, their parts, and the places of these. Pure arithmetic on slices.

A parameter passes through memory in blocks. A block has one window per source slice; elements of other parameters
inside the window are read with it. Each part is written to its target file in the order of that file::

    rows of o_proj in a shard       rank files (TP=2)
    [a0 a1 | b0 b1]  one read       [a0 a1]  one gathered write
    [a2 a3 | b2 b3]  ---------->    [a2 a3]
                                    [b0 b1]  one gathered write
                                    [b2 b3]
"""
from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from stream_reshard.formats.layout import Slice
from stream_reshard.model.box import Box

_MAX_KEPT = 2**12
"""Longer lists of pieces are not kept: a pair takes some 100 bytes, and the rows of a matrix may be 200,000."""


@dataclass(frozen=True)
class Window:
    """A stretch of a source tensor that is read in one go."""

    slice: Slice
    start: int
    """First element, counted from the start of the tensor."""
    stop: int
    """Past the last element."""
    shape: tuple[int, ...]
    """Extent per dim of the elements that are wanted, in the slice's strides; others may stand between them."""

    @property
    def offset(self) -> int:
        """Offset of the window in its file, in bytes."""
        return self.slice.tensor.begin + self.start * self.slice.tensor.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes in the window."""
        return (self.stop - self.start) * self.slice.tensor.itemsize

    def offset_of(self, part: Part) -> int:
        """Offset of a part in the window's file, in bytes."""
        return self.offset + part.window_offset * self.slice.tensor.itemsize


@dataclass(frozen=True)
class Part:
    """The elements that one window holds for one target tensor. Strides and offsets in elements."""

    window: int
    """Index of the window in its block."""
    target: Slice
    target_offset: int
    """Offset of the first element, from the start of the target tensor."""
    window_offset: int
    """Offset of the first element, from the start of the window."""
    shape: tuple[int, ...]
    """Extent per dim, in the order of the target's dims."""
    target_strides: tuple[int, ...]
    window_strides: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        """Count of the elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the target."""
        return self.num_elements * self.target.tensor.itemsize

    @property
    def offset(self) -> int:
        """Offset of the part in the target file, in bytes."""
        return self.target.tensor.begin + self.target_offset * self.target.tensor.itemsize

    @property
    def target_stop(self) -> int:
        """Past the last element, from the start of the target tensor."""
        return self.target_offset + sum((n - 1) * step for n, step in zip(self.shape, self.target_strides)) + 1

    @property
    def is_contiguous(self) -> bool:
        """The elements are contiguous and in the same order on both sides."""
        return run_length(self.shape, self.target_strides, self.window_strides) == self.num_elements


@dataclass(frozen=True)
class Block:
    """One block: the windows that are read, and the parts that are written."""

    windows: tuple[Window, ...]
    parts: tuple[Part, ...]
    """Grouped by target tensor."""

    def keeps_bytes(self, part: Part) -> bool:
        """True where a part is contiguous and keeps its dtype, so its bytes are copied unchanged."""
        return part.is_contiguous and part.target.tensor.dtype == self.windows[part.window].slice.tensor.dtype

    @property
    def is_plain_copy(self) -> bool:
        """Every part is contiguous and keeps its dtype, so bytes are copied unchanged."""
        return all(map(self.keeps_bytes, self.parts))


def blocks(sources: Sequence[Slice], targets: Sequence[Slice], max_elements: int) -> Iterator[Block]:
    """The blocks of a parameter that bring `targets` their elements, in the order of the source. The windows of a block
    have at most `max_elements` elements in all."""
    spread = max(-(-(stop - start) // source.region.num_elements) for source in sources
                 for start, stop in [source.extent_of(source.region)])
    for box in Box.hull([target.region for target in targets]).blocks(max(1, max_elements // spread),
                                                                        sources[0].nesting):
        block = _block(sources, targets, box)
        if block.parts:
            yield block


def whole_block(sources: Sequence[Slice], targets: Sequence[Slice]) -> Block:
    """All elements of `targets` in one block."""
    return _block(sources, targets, Box.hull([target.region for target in targets]))


def _block(sources: Sequence[Slice], targets: Sequence[Slice], box: Box) -> Block:
    windows: list[Window] = []
    parts: list[Part] = []
    for source in sources:
        if (common := box.overlap(source.region)) is None:
            continue
        window = Window(source, *source.extent_of(common), common.shape)
        found = [_part(len(windows), window, target, region) for target in targets
                 if (region := common.overlap(target.region))]
        if found:
            windows.append(window)
            parts += found
    return Block(tuple(windows), tuple(parts))


def _part(index: int, window: Window, target: Slice, region: Box) -> Part:
    dims, source = target.nesting, window.slice
    return Part(index, target, target.offset_of(region), source.offset_of(region) - window.start,
                tuple(region.shape[dim] for dim in dims), tuple(target.strides[dim] for dim in dims),
                tuple(source.strides[dim] for dim in dims))


@lru_cache(maxsize=64)
def run_length(shape: tuple[int, ...], target_strides: tuple[int, ...], window_strides: tuple[int, ...]) -> int:
    """Elements in the longest piece that is contiguous under both strides."""
    return _inner(shape, target_strides, window_strides)[1]


def _inner(shape: tuple[int, ...], target_strides: tuple[int, ...],
           window_strides: tuple[int, ...]) -> tuple[int, int]:
    """(count of outer dims, elements in the inner dims, which are contiguous under both strides)."""
    length = 1
    for dim in reversed(range(len(shape))):
        if shape[dim] == 1:
            continue
        if target_strides[dim] != length or window_strides[dim] != length:
            return dim + 1, length
        length *= shape[dim]
    return 0, length


def runs(shape: tuple[int, ...], target_strides: tuple[int, ...],
         window_strides: tuple[int, ...]) -> Iterable[tuple[int, int]]:
    """(target offset, window offset) of every piece of `run_length` elements, counted from the first piece, in the
    order of the target. Blocks of one shape share the result, layer after layer, unless it is long."""
    outer, _ = _inner(shape, target_strides, window_strides)
    if math.prod(shape[:outer]) > _MAX_KEPT:
        return _offsets(shape[:outer], target_strides, window_strides)
    return _kept(shape[:outer], target_strides, window_strides)


@lru_cache(maxsize=16)
def _kept(shape: tuple[int, ...], target_strides: tuple[int, ...],
          window_strides: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(_offsets(shape, target_strides, window_strides))


def _offsets(shape: tuple[int, ...], target_strides: tuple[int, ...],
             window_strides: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """(target offset, window offset) of every index of a shape."""
    if not shape:
        yield 0, 0
        return
    for target, window in _offsets(shape[:-1], target_strides, window_strides):
        for i in range(shape[-1]):
            yield target + i * target_strides[len(shape) - 1], window + i * window_strides[len(shape) - 1]
