"""Slice, Fill, Group, Layout: the words in which every format says what is where."""
from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from stream_reshard.model.box import Box
from stream_reshard.model.parameters import Model
from stream_reshard.storage.header import StoredTensor, TensorFile


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
    """Elements of the parameter, in its own coordinates."""
    tensor: StoredTensor
    place: Box
    """Their place, in the coordinates of the tensor; as many elements as `region`."""
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
        """Offset in the tensor of the first element of `region` (in the parameter's coordinates), in elements."""
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


class Group(NamedTuple):
    """Files that share parameters with each other and with no other file, and those parameters."""

    position: int
    """Index of the group in its layout."""
    storage_class: Hashable
    """Groups with equal keys are stored alike; only names, and offsets of the data in files, differ."""
    numbers: tuple[int, ...]
    """The parameters, in the order of their places."""


@dataclass(frozen=True, eq=False)
class Layout(ABC):
    """Place of every parameter in the files of one checkpoint. A format is a module that makes one.

    A large model has a million slices, so none is held: a layout knows how to derive those of one parameter, or the
    files of one group. Parameters go by their numbers in the model.
    """

    format: ClassVar[str]
    """Name of the format, for people."""
    files_word: ClassVar[str] = "shards"
    """The format's word for its files."""
    root: Path
    model: Model

    @property
    def facts(self) -> dict[str, Any]:
        """Facts about the layout beyond its model: format, and the choices that decide which file holds what."""
        return {"format": self.format}

    @abstractmethod
    def slices_of(self, number: int) -> tuple[Slice, ...]:
        """Slices that hold each element of a parameter exactly once; () where none is stored."""

    def fills_of(self, number: int) -> tuple[Fill, ...]:
        """The padding that stands beside the elements of a parameter."""
        return ()

    @abstractmethod
    def dtype_at(self, number: int) -> str:
        """The safetensors dtype that the elements of a parameter have here."""

    @abstractmethod
    def storage_class(self, number: int) -> Hashable:
        """Key of a parameter. Parameters of one row with equal keys are stored alike; only names and offsets differ."""

    @abstractmethod
    def locations_of(self, number: int) -> tuple[tuple[int, int], ...]:
        """(which file, where the tensor begins in it, in bytes) of each slice of a parameter."""

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
        """The same layout, still to be written, with the data of the files of each group beginning at these bytes."""
        raise TypeError(f"{self.format} files that are there already begin where they begin")

    @property
    def most_files(self) -> int:
        """Files of a group, or files that hold a part of one parameter, at most."""
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
    def files(self) -> Collection[TensorFile]:
        """Every file, each derived when its turn comes."""
        return _Files(self)

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.nbytes for file in self.files)

    def tensors(self) -> Iterator[StoredTensor]:
        """Every tensor that holds parameters, file by file."""
        return (tensor for file in self.files for tensor in file.tensors)

    @property
    def slices(self) -> Mapping[str, tuple[Slice, ...]]:
        """The slices of each parameter that is stored, by name."""
        return _SlicesByName(self)


class _Files(Collection[TensorFile]):
    """The files of a layout."""

    def __init__(self, layout: Layout):
        self._layout = layout

    def __len__(self) -> int:
        return self._layout.num_files

    def __iter__(self) -> Iterator[TensorFile]:
        return (file for group in self._layout.groups() for file in self._layout.files_of(group))

    def __contains__(self, file: object) -> bool:
        return any(file == other for other in self)


class _SlicesByName(Mapping[str, tuple[Slice, ...]]):
    """The slices of a layout, by the names of the parameters; one that has none is absent."""

    def __init__(self, layout: Layout):
        self._layout = layout

    def __getitem__(self, name: str) -> tuple[Slice, ...]:
        found = self._layout.slices_of(self._layout.model.number_of(name))
        if not found:
            raise KeyError(name)
        return found

    def __iter__(self) -> Iterator[str]:
        return (parameter.name for parameter in self._layout.model.stored() if parameter.name in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)
