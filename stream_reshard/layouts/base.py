"""Slice, Fill, Layout: the words in which every format says what is where."""
from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from stream_reshard.box import Box
from stream_reshard.header import StoredTensor, TensorFile
from stream_reshard.model import Model

TORCH_DTYPES: Mapping[str, str] = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
"""The dtypes that weights may have: safetensors' names, and those of torch, Hugging Face and Nanotron."""


def strides_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Elements between neighbours along each dim of a C-contiguous array of this shape."""
    return tuple(math.prod(shape[dim + 1:]) for dim in range(len(shape)))


def offset_in(shape: tuple[int, ...], index: tuple[int, ...]) -> int:
    """Elements before `index` in a C-contiguous array of this shape."""
    return sum(a * step for a, step in zip(index, strides_of(shape)))


@dataclass(frozen=True)
class Slice:
    """A region of a parameter (global) and its place in a stored tensor (local): Nanotron's own words."""

    parameter: str
    """Name of the parameter."""
    region: Box
    """Which elements, in the coordinates of the parameter."""
    tensor: StoredTensor
    place: Box
    """Where they stand, in the coordinates of the tensor; as many elements as `region`."""
    order: tuple[tuple[int, ...], ...]
    """For each dim of the tensor the parameter's dims that it runs through, outermost first; () where `place` holds one
    index. ((0, 2, 1), (3,)) is a matrix whose rows run through dims 0, 2, 1."""

    @cached_property
    def strides(self) -> tuple[int, ...]:
        """Elements in the tensor between neighbours along each dim of the parameter."""
        strides = [0] * len(self.region.start)
        for step, group in zip(strides_of(self.tensor.shape), self.order):
            for dim in reversed(group):
                strides[dim] = step
                step *= self.region.shape[dim]
        return tuple(strides)

    @property
    def nesting(self) -> tuple[int, ...]:
        """The parameter's dims from the outermost to the innermost one in the tensor."""
        return tuple(dim for group in self.order for dim in group)

    def offset_of(self, region: Box) -> int:
        """Where the first element of `region` (in the parameter's coordinates) stands in the tensor, in elements."""
        inner = region.seen_from(self.region)
        corner = offset_in(self.tensor.shape, self.place.start)
        return corner + sum(a * step for a, step in zip(inner.start, self.strides))

    def extent_of(self, region: Box) -> tuple[int, int]:
        """(start, stop) of the stretch of the tensor from the first to past the last element of `region`, in elements.

        Exact where the region is contiguous in the tensor; otherwise elements of others stand in between.
        """
        start = self.offset_of(region)
        return start, start + sum((n - 1) * step for n, step in zip(region.shape, self.strides)) + 1


@dataclass(frozen=True)
class Fill:
    """Elements of a stored tensor that hold no weight: padding is declared, never a leftover. Filled with zeros."""

    tensor: StoredTensor
    place: Box
    """In the coordinates of the tensor; contiguous there."""


@dataclass(frozen=True)
class Layout:
    """What is where in one checkpoint. A format is a module that makes one."""

    format: str
    """Name of the format, for people."""
    root: Path
    model: Model
    files: tuple[TensorFile, ...]
    slices: Mapping[str, tuple[Slice, ...]]
    """By parameter: where its elements stand, every one exactly once."""
    fills: Mapping[str, tuple[Fill, ...]]
    """By parameter: the padding that stands beside its elements. Parameters without padding are absent."""
    ignored: Mapping[str, str]
    """Stored tensors that hold no parameter, with the reason."""

    def tensors(self) -> Iterator[StoredTensor]:
        """Every stored tensor, file by file."""
        return (tensor for file in self.files for tensor in file.tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensor files."""
        return sum(file.nbytes for file in self.files)

    def dtype_of(self, parameter: str) -> str:
        """The safetensors dtype that the elements of a parameter have here."""
        return self.slices[parameter][0].tensor.dtype
