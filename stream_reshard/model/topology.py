"""Topology: the number of ranks on each parallel axis, and the part of a dim that one rank holds."""
from __future__ import annotations

from dataclasses import dataclass

from stream_reshard.errors import UsageError


@dataclass(frozen=True)
class Topology:
    """The sizes of the parallel axes."""

    tp: int = 1
    """Ranks that share each split parameter."""
    pp: int = 1
    """Pipeline stages."""
    dp: int = 1
    """Replicas of the whole model; their number appears in no weight file."""

    def __post_init__(self) -> None:
        for axis in ("tp", "pp", "dp"):
            if getattr(self, axis) < 1:
                raise UsageError(f"--{axis} {getattr(self, axis)}: an axis has at least 1 rank")

    @property
    def world_size(self) -> int:
        """Number of processes in a training run at this topology."""
        return self.tp * self.pp * self.dp

    def __str__(self) -> str:
        return f"TP={self.tp} PP={self.pp} DP={self.dp}"


def part_of(size: int, num_parts: int, index: int) -> tuple[int, int]:
    """(start, stop) of the `index`-th of `num_parts` equal parts of a dim with `size` elements."""
    if size % num_parts:
        raise ValueError(f"{size} elements cannot be split into {num_parts} equal parts")
    part = size // num_parts
    return index * part, (index + 1) * part
