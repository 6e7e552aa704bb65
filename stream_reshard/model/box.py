"""Box: a half-open n-d region of an array, in elements. It does not know the array."""
from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import gt, lt, sub


@dataclass(frozen=True)
class Box:
    """The elements x with start[k] <= x[k] < stop[k] in every dim k. A box of rank 0 holds one element."""

    start: tuple[int, ...]
    """First index per dim, inclusive."""
    stop: tuple[int, ...]
    """Last index per dim, exclusive; never below `start`."""

    def __post_init__(self) -> None:
        if len(self.start) != len(self.stop) or any(map(gt, self.start, self.stop)):
            raise ValueError(f"not a box: {self.start} to {self.stop}")

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Box:
        """The box of all elements of an array of this shape."""
        return cls((0,) * len(shape), tuple(shape))

    @classmethod
    def hull(cls, boxes: Sequence[Box]) -> Box:
        """The smallest box that contains all of these; there is at least one."""
        starts, stops = zip(*(box.start for box in boxes)), zip(*(box.stop for box in boxes))
        return cls(tuple(map(min, starts)), tuple(map(max, stops)))

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Extent per dim, in elements."""
        return tuple(map(sub, self.stop, self.start))

    @property
    def num_elements(self) -> int:
        """Product of the extents."""
        return math.prod(self.shape)

    def overlap(self, other: Box) -> Box | None:
        """The common region; None where the boxes share no element. A box that is not empty overlaps itself wholly."""
        start = tuple(map(max, self.start, other.start))
        stop = tuple(map(min, self.stop, other.stop))
        return Box(start, stop) if all(map(lt, start, stop)) else None

    def contains(self, other: Box) -> bool:
        """True where the box holds every element of `other`."""
        return self.overlap(other) == other or not other.num_elements

    def seen_from(self, origin: Box) -> Box:
        """This box in coordinates whose zero is the start of `origin`."""
        return Box(tuple(map(sub, self.start, origin.start)), tuple(map(sub, self.stop, origin.start)))

    def with_extent(self, dim: int, start: int, stop: int) -> Box:
        """A box that runs from `start` to `stop` in one dim, and like this one in all others."""
        return Box(self.start[:dim] + (start,) + self.start[dim + 1:], self.stop[:dim] + (stop,) + self.stop[dim + 1:])

    def flat_in(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """(offset, count) of this box in a flattened C-contiguous array of `shape`, in which it is one stretch."""
        offset = 0
        for first, extent in zip(self.start, shape):
            offset = offset * extent + first
        return offset, self.num_elements

    def blocks(self, max_elements: int, order: Sequence[int] | None = None) -> Iterator[Box]:
        """Cut this box into boxes of at most `max_elements`, each contiguous in an array of this box's shape.

        `order` lists the dims of the array from the outermost to the innermost (default: 0, 1, 2 ...). The boxes come
        in the order of the array, cover this box, and do not overlap.
        """
        if max_elements < 1:
            raise ValueError(f"a block of {max_elements} elements")
        if not self.num_elements:
            return
        dims = tuple(range(len(self.start))) if order is None else tuple(order)
        if not dims or self.num_elements <= max_elements:
            yield self
            return
        outer, inner = dims[0], dims[1:]
        per_index = math.prod(self.shape[dim] for dim in inner)
        step = max(1, max_elements // per_index)
        for start in range(self.start[outer], self.stop[outer], step):
            band = self.with_extent(outer, start, min(start + step, self.stop[outer]))
            yield from band.blocks(max_elements, inner) if per_index > max_elements else (band,)


def boxes_of_range(shape: tuple[int, ...], start: int, stop: int) -> list[Box]:
    """The boxes, in order, that hold elements `start` to `stop` of a flattened C-contiguous array of `shape`: whole
    indices of the outermost dim in the middle, and parts of one index before and behind. Each is one stretch."""
    if start >= stop:
        return []
    if len(shape) <= 1:
        return [Box((start,) * len(shape), (stop,) * len(shape))] if shape else [Box((), ())]
    inner = math.prod(shape[1:])
    (first, head), (last, tail) = divmod(start, inner), divmod(stop, inner)
    if first == last:
        return _at(first, boxes_of_range(shape[1:], head, tail))
    before = _at(first, boxes_of_range(shape[1:], head, inner)) if head else []
    behind = _at(last, boxes_of_range(shape[1:], 0, tail))
    middle = first + bool(head)
    whole = [Box((middle, *[0] * (len(shape) - 1)), (last, *shape[1:]))] if middle < last else []
    return [*before, *whole, *behind]


def _at(index: int, boxes: Iterable[Box]) -> list[Box]:
    """The same boxes at one index of a further, outermost dim."""
    return [Box((index, *box.start), (index + 1, *box.stop)) for box in boxes]


def tiling_fault(boxes: Sequence[Box], whole: Box) -> str | None:
    """Reason why `boxes` do not cover every element of `whole` exactly once; None where they do.

    Disjoint boxes inside `whole` whose volumes add up to its volume leave no element out.
    """
    return packing_fault(boxes, whole, whole.num_elements)


def packing_fault(boxes: Sequence[Box], whole: Box, num_elements: int) -> str | None:
    """Reason why `boxes` are not disjoint boxes inside `whole` with `num_elements` in all; None where they are."""
    for box in boxes:
        if not whole.contains(box):
            return f"{box.start}..{box.stop} reaches out of {whole.start}..{whole.stop}"
    full = sorted((box for box in boxes if box.num_elements), key=lambda box: box.start)
    for i, first in enumerate(full):
        for second in full[i + 1:]:
            if second.start[:1] >= first.stop[:1]:
                break
            if first.overlap(second):
                return f"{first.start}..{first.stop} and {second.start}..{second.stop} overlap"
    covered = sum(box.num_elements for box in full)
    return None if covered == num_elements else f"{covered} of {num_elements} elements are covered"


def has_duplicates(numbers: Iterable[int]) -> bool:
    """True where a number occurs twice; numbers are signed and have at most 64 bits.

    The numbers are sorted in 64 parts, because a sorted list takes five times the memory of an array.
    """
    parts = [array("q") for _ in range(64)]
    for number in numbers:
        parts[number & 63].append(number)
    return any(first == second for part in map(sorted, parts) for first, second in zip(part, part[1:]))
