"""The values of optimizer files to be written, and the places of their states.

What is one object in a file is written once, and Nanotron's files have one object for equal texts and for equal tuples:
dicts made in a loop share their keys, and all groups the pair of betas. So the values of several files are joined with
one object for each.
"""
from __future__ import annotations

import hashlib
import math
import zlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stream_reshard.formats.nanotron.training.entries import GROUP, STATE, Entry, Shape, is_scalar
from stream_reshard.formats.nanotron.training.layout import MASTERS
from stream_reshard.storage.crc32 import Piece, crc_of_pieces
from stream_reshard.storage.torch_values import (
    StorageReference, TensorReference, new_storage, new_tensor)
from stream_reshard.storage.torch_writer import NewRecord, NewTorchFile, folder_of, plan_torch_file


class Shared:
    """Makes equal texts, and equal tuples, one object."""

    def __init__(self) -> None:
        self._objects: dict[tuple[type, str], Any] = {}

    def __call__(self, value: Any) -> Any:
        """The value with shared objects in the place of its texts and tuples."""
        if type(value) is dict:
            return {self(key): self(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self(item) for item in value]
        if isinstance(value, (str, tuple)):
            if isinstance(value, tuple):
                value = tuple(map(self, value))
            return self._objects.setdefault((type(value), repr(value)), value)
        return value


@dataclass(frozen=True)
class NewOptimizerFile:
    """An optimizer file to be written: its records, and all that is known of it before the states come."""

    file: NewTorchFile
    scalars: Mapping[int, bytes]
    """The bytes of scalars, by the id of their storage."""
    states: Mapping[int, tuple[TensorReference, ...]]
    """The states in a storage, by its id."""
    begins: array[int]
    """Offset of each kind of state of each parameter of the stage, in bytes; 0 where the file does not hold it."""

    def rest(self, crcs: Mapping[int, int]) -> Iterator[tuple[int, bytes]]:
        """(offset, bytes) of all that is no state. `crcs`: the CRC-32 of each state, by its offset in the file."""
        found: list[int] = []
        for index, record in enumerate(self.file.storages):
            yield self.file.seam(index, found[-1] if found else 0)
            content = self.scalars.get(id(record.storage))
            if content is not None:
                yield record.begin, content
            found.append(self._crc_of(record, crcs) if content is None else zlib.crc32(content))
        yield self.file.end(found)

    @property
    def digest(self) -> str:
        """sha256 of all values but the states, in hex."""
        (_, pickled), *_ = self.file.before
        return hashlib.sha256(pickled + b"".join(self.scalars.values())).hexdigest()

    def _crc_of(self, record: NewRecord, crcs: Mapping[int, int]) -> int:
        pieces = []
        for tensor in self.states[id(record.storage)]:
            begin = tensor.offset * tensor.itemsize
            pieces.append(Piece(begin, tensor.num_elements * tensor.itemsize, crcs[record.begin + begin]))
        return crc_of_pieces(pieces, record.nbytes)


def new_optimizer_file(path: str, entries: Sequence[tuple[Entry, Shape]], keys: Sequence[str],
                       kinds: Sequence[str], has_one_group: bool = False) -> NewOptimizerFile:
    """The file at `path` that holds the states of these parameters, each in a shape; None where the rank has none.
    `keys`: the keys of a file, in their order. `has_one_group`: all parameters are in one group."""
    values = _Values(entries, kinds)
    if has_one_group:
        values.param_groups = [{**values.param_groups[0], "params": list(values.names)}]
    file = plan_torch_file({key: getattr(values, key) for key in values.shared(list(keys))}, folder_of(path))
    places = {id(record.storage): record.begin for record in file.storages}
    begins = array("Q", bytes(8 * len(entries) * len(kinds)))
    states: dict[int, tuple[TensorReference, ...]] = {}
    for at, tensor in values.tensors.items():
        begins[at] = places[id(tensor.storage)] + tensor.offset * tensor.itemsize
        states[id(tensor.storage)] = (*states.get(id(tensor.storage), ()), tensor)
    return NewOptimizerFile(file, values.scalars, states, begins)


class _Values:
    """The values of a file, under the names of its keys."""

    def __init__(self, entries: Sequence[tuple[Entry, Shape]], kinds: Sequence[str]):
        self.state: dict[int, dict[str, Any]] = {}
        self.param_groups: list[dict[str, Any]] = []
        self.names: dict[int, str] = {}
        self.gradient_accumulator: dict[str, TensorReference] = {}
        self.scalars: dict[int, bytes] = {}
        self.tensors: dict[int, TensorReference] = {}
        """The states, by the index of the parameter times the count of kinds plus the index of the kind."""
        self.shared = Shared()
        masters, offset = self._master_storage(entries), 0
        for index, (entry, shape) in enumerate(entries):
            number = len(self.names)
            params = [] if shape is None else [number]
            group = {key: self._scalar(entry, GROUP, key, value) for key, value in entry.group.items()}
            self.param_groups.append(self.shared({**group, "params": params}))
            if shape is None:
                continue
            self.names[number] = name = self.shared(entry.name)
            self.state[number] = self._state_of(entry, shape, index * len(kinds))
            if masters is not None:
                tensor = new_tensor(entry.dtypes[MASTERS], shape, masters, offset, requires_grad=True)
                self.gradient_accumulator[name] = self.tensors[index * len(kinds) + len(kinds) - 1] = tensor
                offset += tensor.num_elements

    def _master_storage(self, entries: Sequence[tuple[Entry, Shape]]) -> StorageReference | None:
        """The one storage of all masters, back to back (nanotron/optim/gradient_accumulator.py)."""
        num_elements = sum(math.prod(shape) for entry, shape in entries if shape is not None)
        dtypes = {entry.dtypes[MASTERS] for entry, _ in entries if MASTERS in entry.dtypes}
        return new_storage(dtypes.pop(), num_elements) if dtypes else None

    def _state_of(self, entry: Entry, shape: tuple[int, ...], at: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        kind = at
        for key, value in entry.state.items():
            if isinstance(value, TensorReference) and not is_scalar(value):
                own = self.tensors[kind] = new_tensor(value.dtype, shape)
                kind += 1
            else:
                own = self.shared(self._scalar(entry, STATE, key, value))
            found[self.shared(key)] = own
        return found

    def _scalar(self, entry: Entry, place: str, key: str, value: Any) -> Any:
        """A value; a tensor of no dims with a storage of its own."""
        if not is_scalar(value):
            return value
        own = new_tensor(value.dtype, ())
        self.scalars[id(own.storage)] = entry.scalars[place, key]
        return own
