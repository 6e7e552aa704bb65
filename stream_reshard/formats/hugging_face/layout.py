"""The layout of an existing Hugging Face folder: each stored parameter is one tensor in one of the shards."""
from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from stream_reshard.formats.layout import Group, Layout, Slice
from stream_reshard.model.box import Box
from stream_reshard.storage.dtypes import ITEMSIZE
from stream_reshard.storage.header import StoredTensor, TensorFile

DTYPES = (None, *ITEMSIZE)
"""The dtype of each code; code 0 is a missing tensor."""

CODES = {dtype: code for code, dtype in enumerate(DTYPES)}

SPELLING = 32
"""A code of dtype and spelling is `CODES[dtype] + SPELLING * spelling`."""

TRANSPOSED = 128
"""Added to the code of a matrix that stands column by column."""


@dataclass(frozen=True, eq=False)
class HuggingFaceLayout(Layout):
    """The layout of a folder of shards. It keeps 13 bytes per parameter; the model gives shape and name."""

    format = "Hugging Face"
    shards: tuple[str, ...]
    """Names of the shards."""
    sizes: array[int] = field(repr=False)
    """Size of each shard, in bytes."""
    shard_numbers: array[int] = field(repr=False)
    """The shard of each parameter, as an index in `shards`."""
    begins: array[int] = field(repr=False)
    """Offset of each parameter in its shard, in bytes."""
    codes: array[int] = field(repr=False)
    """Code of each parameter's dtype, of the spelling of its name (`Model.spellings`) and of its order; 0 where it has
    no tensor, which is allowed for a tied parameter only."""
    ignored: Mapping[str, str]
    """Stored tensors that hold no parameter, with the reason."""
    notes: tuple[str, ...] = ()
    """Remarks on other spellings of names, and on wrong entries of the index."""

    @property
    def nbytes(self) -> int:
        """Bytes of all shards."""
        return sum(self.sizes)

    def tensor_of(self, number: int) -> StoredTensor | None:
        """The tensor of a parameter, stored or tied; None where it has none."""
        if not self.codes[number]:
            return None
        key = self.model.spellings(number)[self.codes[number] % TRANSPOSED // SPELLING]
        shape = self.model.parameter(number).matrix_shape
        return StoredTensor(self.shards[self.shard_numbers[number]], key, self.dtype_at(number),
                            shape[::-1] if self.is_transposed(number) else shape, self.begins[number])

    def is_transposed(self, number: int) -> bool:
        """True where the tensor of a parameter has the matrix's columns as its rows."""
        return self.codes[number] >= TRANSPOSED

    def count_dtypes(self) -> dict[str, int]:
        """Count of tensors per dtype."""
        counts: Counter[str] = Counter()
        for code, count in Counter(self.codes).items():
            if code:
                counts[str(DTYPES[code % SPELLING])] += count
        return dict(counts)

    def tied(self) -> Iterator[tuple[StoredTensor, StoredTensor]]:
        """(tensor of a tied parameter, tensor whose values it must have) where both exist."""
        firsts = self.model.firsts
        for number in (firsts[row] for row in self.model.tied_rows):
            if (tensor := self.tensor_of(number)) and (name := self.model.parameter(number).tied_to):
                yield tensor, self.slices[name][0].tensor

    def slices_of(self, number: int) -> tuple[Slice, ...]:
        parameter, tensor = self.model.parameter(number), self.tensor_of(number)
        if tensor is None or parameter.tied_to:
            return ()
        order = parameter.matrix[::-1] if self.is_transposed(number) else parameter.matrix
        return (Slice(parameter.name, parameter.whole, tensor, Box.whole(tensor.shape), order),)

    def dtype_at(self, number: int) -> str:
        return str(DTYPES[self.codes[number] % SPELLING])

    def storage_class(self, number: int) -> int:
        return self.codes[number]

    def locations_of(self, number: int) -> tuple[tuple[int, int], ...]:
        return ((self.shard_numbers[number], self.begins[number]),)

    @property
    def num_groups(self) -> int:
        return len(self.shards)

    @property
    def num_files(self) -> int:
        return len(self.shards)

    @cached_property
    def _by_location(self) -> array[int]:
        """The stored parameters in the order of their bytes."""
        stored = [number for row in self.model.stored_rows for number in self.model.numbers_of(row)]
        return array("I", sorted(stored, key=lambda number: self.shard_numbers[number] << 48 | self.begins[number]))

    def group(self, position: int) -> Group:
        first = bisect_left(self._by_location, position, key=self.shard_numbers.__getitem__)
        last = bisect_left(self._by_location, position + 1, key=self.shard_numbers.__getitem__)
        return Group(position, position, tuple(self._by_location[first:last]))

    @property
    def paths(self) -> Iterator[str]:
        return iter(self.shards)

    def paths_of(self, group: Group) -> list[str]:
        return [self.shards[group.position]]

    def files_of(self, group: Group) -> tuple[TensorFile, ...]:
        tensors = (part.tensor for number in group.numbers for part in self.slices_of(number))
        return (TensorFile(self.shards[group.position], tuple(tensors)),)
