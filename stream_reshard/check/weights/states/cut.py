"""The stretches of a parameter that ZeRO-1 gives the data-parallel ranks: the shard is flattened in C order, and
the last ones are shorter by one (nanotron/optim/zero.py)."""
from __future__ import annotations

from collections.abc import Iterator

from stream_reshard.model.box import Box


def stretch_of(num_elements: int, num_ranks: int, rank: int) -> tuple[int, int]:
    """(start, stop) of the elements of a flattened shard that a rank keeps."""
    longest = (num_elements - 1) // num_ranks + 1
    num_long = num_ranks - (longest * num_ranks - num_elements)
    start = rank * longest - max(0, rank - num_long)
    return start, start + longest - (rank >= num_long)


def boxes_between(start: int, stop: int, width: int) -> Iterator[Box]:
    """The elements from start to stop of a flattened matrix of `width` columns, as at most three boxes: the end of a
    row, whole rows, the beginning of a row."""
    while start < stop:
        row, column = divmod(start, width)
        if column or stop - start < width:
            end = min(width, column + stop - start)
            yield Box((row, column), (row + 1, end))
            start += end - column
        else:
            num_rows = (stop - start) // width
            yield Box((row, 0), (row + num_rows, width))
            start += num_rows * width
