"""ZeRO-1: each data-parallel rank keeps a part of the state of every parameter (nanotron/optim/zero.py).

After tensor parallelism, the shard of a parameter is flattened in C order and cut into stretches, the longer ones
first. So a stretch begins and ends in the middle of rows.
"""
from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from stream_reshard.formats.nanotron.ranks import RankPart
from stream_reshard.model.box import Box, boxes_of_range


def stretch_of(num_elements: int, num_ranks: int, rank: int) -> tuple[int, int]:
    """(start, stop) of a rank's elements in a flattened shard; empty where there are fewer elements than ranks."""
    least, num_longer = divmod(num_elements, num_ranks)
    start = rank * least + min(rank, num_longer)
    return start, start + least + (rank < num_longer)


def regions_in(part: RankPart, shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[Box, Box]]:
    """(region of the parameter, place in the shard) of the elements of a part that lie in a stretch of the flattened
    shard of this shape."""
    for box in boxes_of_range(shape, start, stop):
        if common := box.overlap(part.place):
            yield from _split(part, common)


def padding_in(part: RankPart, shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """Places of padding, in the shard, that lie in a stretch of the flattened shard of this shape."""
    for box in boxes_of_range(shape, start, stop) if part.padding else ():
        if part.padding and (common := box.overlap(part.padding)):
            yield common


def _split(part: RankPart, place: Box) -> Iterator[tuple[Box, Box]]:
    """The same for a box of the shard. Rows of a head-wise parameter run through several of its dims, and a range of
    rows is then several boxes of these."""
    inside, extents = place.seen_from(part.place), part.region.shape
    cuts = []
    for first, last, dims in zip(inside.start, inside.stop, part.order):
        boxes = boxes_of_range(tuple(extents[dim] for dim in dims), first, last) if dims else [Box((), ())]
        cuts.append([(dims, box) for box in boxes])
    for choice in product(*cuts):
        region_start, region_stop = list(part.region.start), list(part.region.stop)
        start, stop = list(part.place.start), list(part.place.stop)
        for axis, (dims, box) in enumerate(choice):
            for dim, low, high in zip(dims, box.start, box.stop):
                region_start[dim], region_stop[dim] = part.region.start[dim] + low, part.region.start[dim] + high
            if dims:
                offset, num = box.flat_in(tuple(extents[dim] for dim in dims))
                start[axis], stop[axis] = part.place.start[axis] + offset, part.place.start[axis] + offset + num
        yield Box(tuple(region_start), tuple(region_stop)), Box(tuple(start), tuple(stop))
