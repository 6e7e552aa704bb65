"""The layout of Meta's parts: every parameter is one tensor in each of them, split or repeated."""
from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from stream_reshard.formats.layout import Group, Layout, Slice, interleaved
from stream_reshard.formats.meta.names import key_of
from stream_reshard.model.box import Box
from stream_reshard.model.parameters import Model, Parameter
from stream_reshard.model.topology import part_of
from stream_reshard.storage.header import StoredTensor, TensorFile


@dataclass(frozen=True)
class Split:
    """How Meta splits a model: as tensor parallelism does, but for the embedding of Llama 1 and 2."""

    num_parts: int
    embedding_dim: str
    """The dim that splits the embedding: "hidden" (`ParallelEmbedding` of fairscale, in Llama 1 and 2) or "vocab"
    (`VocabParallelEmbedding`, in Llama 3)."""

    def dim_of(self, parameter: Parameter) -> int | None:
        """The dim that splits a parameter; None where every part has the whole."""
        name = self.embedding_dim if parameter.name == "embedding" else parameter.split
        return None if name is None else parameter.dims.index(name)

    def region_of(self, parameter: Parameter, part: int) -> Box:
        """Elements of a parameter in one part."""
        dim = self.dim_of(parameter)
        if dim is None:
            return parameter.whole
        return parameter.whole.with_extent(dim, *part_of(parameter.shape[dim], self.num_parts, part))

    def shape_of(self, parameter: Parameter) -> tuple[int, ...]:
        """Shape of a parameter's tensor in every part."""
        shape, dim = list(parameter.matrix_shape), self.dim_of(parameter)
        if dim is not None:
            shape[next(i for i, group in enumerate(parameter.matrix) if dim in group)] //= self.num_parts
        return tuple(shape)

    def uneven(self, model: Model) -> Iterator[tuple[str, int]]:
        """(dim, its extent) of each dim that the parts cannot split evenly."""
        for name in dict.fromkeys((self.embedding_dim, "vocab", "heads", "kv_heads", "ffn")):
            if (size := model.config.sizes[name]) % self.num_parts:
                yield name, size


@dataclass(frozen=True, eq=False)
class MetaLayout(Layout):
    """The layout of a folder of parts."""

    format = "Meta"
    file_word = "part"
    parts: tuple[str, ...]
    """Names of the files."""
    sizes: Sequence[int] = field(repr=False)
    """Size of each file, in bytes."""
    split: Split
    begins: tuple[array[int], ...] = field(repr=False)
    """Offset of each parameter in each part, in bytes; 0 for a tied one that is not there."""
    dtypes: Sequence[str] = field(repr=False)
    """The dtype of each parameter; "" for a tied one that is not there."""
    ignored: Mapping[str, str]
    """Stored tensors that hold no parameter, with the reason."""

    @property
    def facts(self) -> dict[str, Any]:
        return {"format": self.format, "parts": len(self.parts)}

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(self.sizes)

    def tensors_of(self, number: int) -> tuple[StoredTensor, ...]:
        """The tensor of a parameter in each part, stored or tied; () where it has none."""
        if not self.dtypes[number]:
            return ()
        key, shape = key_of(self.model, number), self.split.shape_of(self.model.parameter(number))
        return tuple(StoredTensor(name, key, self.dtypes[number], shape, begins[number])
                     for name, begins in zip(self.parts, self.begins))

    def repeats(self) -> Iterator[tuple[StoredTensor, StoredTensor]]:
        """(tensor, tensor that must have its bytes): a norm in two parts, a tied head and the embedding."""
        model = self.model
        for number in (number for row in model.stored_rows for number in model.numbers_of(row)
                       if model.rows[row].split is None):
            first, *others = self.tensors_of(number)
            yield from ((first, other) for other in others)
        embedding = self.tensors_of(model.number_of("embedding"))
        for row in model.tied_rows:
            yield from zip(self.tensors_of(model.firsts[row]), embedding)

    def slices_of(self, number: int) -> tuple[Slice, ...]:
        parameter = self.model.parameter(number)
        if parameter.tied_to:
            return ()
        tensors, order = self.tensors_of(number)[:self._num_slices(parameter)], interleaved(parameter)
        return tuple(Slice(parameter.name, self.split.region_of(parameter, part), tensor, Box.whole(tensor.shape),
                           order) for part, tensor in enumerate(tensors))

    def _num_slices(self, parameter: Parameter) -> int:
        """Number of parts from which a parameter is read; what all of them repeat is read from the first."""
        return 1 if self.split.dim_of(parameter) is None else len(self.parts)

    def dtype_at(self, number: int) -> str:
        return self.dtypes[number]

    def storage_class(self, number: int) -> str:
        return self.dtypes[number]

    def locations_of(self, number: int) -> tuple[tuple[int, int], ...]:
        num_slices = self._num_slices(self.model.parameter(number))
        return tuple((part, begins[number]) for part, begins in enumerate(self.begins[:num_slices]))

    @property
    def num_groups(self) -> int:
        return 1

    @property
    def num_files(self) -> int:
        return len(self.parts)

    @property
    def most_files(self) -> int:
        return len(self.parts)

    @cached_property
    def _by_location(self) -> tuple[int, ...]:
        """The stored parameters in the order of their bytes in the first part."""
        stored = (number for row in self.model.stored_rows for number in self.model.numbers_of(row))
        return tuple(sorted(stored, key=self.begins[0].__getitem__))

    def group(self, position: int) -> Group:
        return Group(position, position, self._by_location)

    def paths_of(self, group: Group) -> list[str]:
        return list(self.parts)

    def files_of(self, group: Group) -> tuple[TensorFile, ...]:
        tensors = [self.tensors_of(number) for number in group.numbers]
        return tuple(TensorFile(name, tuple(sorted((own[part] for own in tensors), key=lambda own: own.begin)))
                     for part, name in enumerate(self.parts))
