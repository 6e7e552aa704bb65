"""Slice, Fill, Group, Layout: the terms in which every format states what is where."""
from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from stream_reshard.model.box import Box
from stream_reshard.model.parameters import Model, Parameter
from stream_reshard.storage.header import StoredTensor, TensorFile


def strides_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Elements between neighbours along each dim of a C-contiguous array of this shape."""
    return tuple(math.prod(shape[dim + 1:]) for dim in range(len(shape)))


def offset_in(shape: tuple[int, ...], index: tuple[int, ...]) -> int:
    """Elements before `index` in a C-contiguous array of this shape."""
    return sum(a * step for a, step in zip(index, strides_of(shape)))


def interleaved(parameter: Parameter) -> tuple[tuple[int, ...], ...]:
    """`Slice.order` of a parameter where rotary embedding interleaves: a head is stored as (pair, half)."""
    if "half" not in parameter.dims:
        return parameter.matrix
    half, pair = parameter.dims.index("half"), parameter.dims.index("pair")
    swap = {half: pair, pair: half}
    return tuple(tuple(swap.get(dim, dim) for dim in group) for group in parameter.matrix)


@dataclass(frozen=True)
class Slice:
    """A region of a parameter and its place in a stored tensor. (Nanotron calls them global and local.)"""

    parameter: str
    """Name of the parameter."""
    region: Box
    """Elements of the parameter, in the parameter's coordinates."""
    tensor: StoredTensor
    place: Box
    """Elements of the tensor, in the tensor's coordinates; as many as `region` has."""
    order: tuple[tuple[int, ...], ...]
    """For each dim of the tensor, the parameter's dims merged into it, outermost first; () where `place` has extent 1.
    ((0, 2, 1), (3,)) is a matrix: its rows run through dims 0, 2, 1 of the parameter, its columns through dim 3."""

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
        """The parameter's dims, from the outermost to the innermost in the tensor."""
        return tuple(dim for group in self.order for dim in group)

    def offset_of(self, region: Box) -> int:
        """Offset of the first element of `region` (a box of the parameter) in the tensor, in elements."""
        inner = region.seen_from(self.region)
        corner = offset_in(self.tensor.shape, self.place.start)
        return corner + sum(a * step for a, step in zip(inner.start, self.strides))

    def extent_of(self, region: Box) -> tuple[int, int]:
        """(start, stop) of the shortest stretch of the tensor that holds all of `region`, in elements. It also holds
        other elements, unless the region is contiguous in the tensor."""
        start = self.offset_of(region)
        return start, start + sum((n - 1) * step for n, step in zip(region.shape, self.strides)) + 1


@dataclass(frozen=True)
class Fill:
    """A place that holds padding: zeros instead of weights. A layout lists its padding; it is never a remainder."""

    tensor: StoredTensor
    place: Box
    """Elements of the tensor, contiguous in it."""


class Group(NamedTuple):
    """Files that share parameters with each other and with no other file, and those parameters."""

    position: int
    """Index of the group in its layout."""
    storage_class: Hashable
    """Groups with equal keys are stored alike; only names and offsets differ."""
    numbers: tuple[int, ...]
    """The parameters, in the order of their places in the files."""


@dataclass(frozen=True, eq=False)
class Layout(ABC):
    """The place of every parameter in the files of one checkpoint. Each format has its own subclasses.

    A large model has a million slices, so they are not kept: a layout derives the slices of one parameter, or the files
    of one group, when asked. Parameters are given by their numbers in the model.
    """

    format: ClassVar[str]
    """Name of the format, for people."""
    file_word: ClassVar[str] = "shard"
    """The format's word for one of its files."""
    root: Path
    model: Model

    @property
    def facts(self) -> dict[str, Any]:
        """Facts about the layout, for JSON: its format, and the choices that decide which file holds what."""
        return {"format": self.format}

    @abstractmethod
    def slices_of(self, number: int) -> tuple[Slice, ...]:
        """Slices that hold each element of a parameter exactly once; () for a parameter that is not stored."""

    def copies_of(self, number: int) -> tuple[Slice, ...]:
        """Slices of files to be written that repeat elements of `slices_of`."""
        return ()

    def fills_of(self, number: int) -> tuple[Fill, ...]:
        """The padding in the tensors of a parameter."""
        return ()

    @abstractmethod
    def dtype_at(self, number: int) -> str:
        """The safetensors dtype of a stored parameter."""

    @abstractmethod
    def storage_class(self, number: int) -> Hashable:
        """Key of a parameter. Parameters of one row with equal keys are stored alike; only names and offsets differ."""

    @abstractmethod
    def locations_of(self, number: int) -> tuple[tuple[int, int], ...]:
        """(index of the file, offset of the tensor in it in bytes) of each slice of a parameter."""

    @property
    @abstractmethod
    def num_groups(self) -> int:
        """Number of groups."""

    @abstractmethod
    def group(self, position: int) -> Group:
        """The group at a position."""

    def groups(self) -> Iterator[Group]:
        """Every group."""
        return map(self.group, range(self.num_groups))

    @abstractmethod
    def paths_of(self, group: Group) -> list[str]:
        """The paths of a group's files."""

    @abstractmethod
    def files_of(self, group: Group) -> tuple[TensorFile, ...]:
        """The files of a group."""

    def aligned(self, begins: Callable[[Group], Sequence[int]]) -> Layout:
        """A layout whose data begin at other offsets in the files. `begins`: offset per file of a group, in bytes. Only
        for layouts that are still to be written."""
        raise TypeError(f"the files of {type(self).__name__} exist; the offset of their data cannot be chosen")

    @property
    def most_files(self) -> int:
        """The largest number of files in a group, which is also the largest number of files with parts of one
        parameter."""
        return 1

    @property
    @abstractmethod
    def num_files(self) -> int:
        """Number of files."""

    @property
    def paths(self) -> Iterator[str]:
        """The path of every file."""
        return (path for group in self.groups() for path in self.paths_of(group))

    @property
    def files(self) -> Iterator[TensorFile]:
        """Every file, group by group."""
        return (file for group in self.groups() for file in self.files_of(group))

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.nbytes for file in self.files)

    def tensors(self) -> Iterator[StoredTensor]:
        """Every tensor of the parameters, file by file."""
        return (tensor for file in self.files for tensor in file.tensors)

    @property
    def slices(self) -> Mapping[str, tuple[Slice, ...]]:
        """The slices of each stored parameter, by name."""
        return _SlicesByName(self)


class SharedFiles(ABC):
    """Files of which each job writes its tensors, and nobody what stands between them, until all tensors are there."""

    @abstractmethod
    def sizes(self) -> Iterator[tuple[str, int]]:
        """(path, size in bytes) of every file."""

    @abstractmethod
    def rest_of(self, path: str, crcs: Mapping[int, int]) -> Iterator[tuple[int, bytes]]:
        """(offset, bytes) of all in a file that is no tensor. `crcs`: the CRC-32 of each tensor, by its offset."""


class _SlicesByName(Mapping[str, tuple[Slice, ...]]):
    """The slices of a layout, by name of a parameter; a parameter without slices is absent."""

    def __init__(self, layout: Layout):
        self._layout = layout

    def __getitem__(self, name: str) -> tuple[Slice, ...]:
        if not (slices := self._layout.slices_of(self._layout.model.number_of(name))):
            raise KeyError(name)
        return slices

    def __iter__(self) -> Iterator[str]:
        return (parameter.name for parameter in self._layout.model.stored() if parameter.name in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)
