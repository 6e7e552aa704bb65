"""Pickles of states byte for byte as torch.save writes them, without torch.

The rules are those of the pickler in C that torch.save takes (Modules/_pickle.c, protocol 2), the order in which it
meets objects that of torch/_tensor.py, _reduce_ex_internal, and torch/serialization.py, persistent_id. What is one
object is written once and referred to by its number then: who changes a value that was read keeps its other objects.
"""
from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from stream_reshard.storage.restricted_pickle import PROTOCOL
from stream_reshard.storage.torch_names import (DTYPES, ORDERED_DICT, PARAMETER, STORAGES, TENSOR_V2, TENSOR_V3, Name)
from stream_reshard.storage.torch_values import LITERALS, UNTYPED, StorageReference, TensorReference

_BATCH = 1000
"""Items that are written between two marks (Modules/_pickle.c, BATCHSIZE)."""

_KIND_NAMES = {kind: name for name, kind in STORAGES.items()}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_pickle(contents: Any) -> tuple[bytes, list[StorageReference]]:
    """The pickle of a tree of values, and its storages in the order in which it names them: the first one 0, and so on,
    whatever their keys are. Raises TypeError for what is no value of a state."""
    writer = _Writer()
    writer.save(contents)
    writer.out += b"."
    return bytes(writer.out), writer.storages


class _Writer:
    """Collects opcodes. Each `save` leaves the reader one value more on its stack."""

    def __init__(self) -> None:
        self.out = bytearray(PROTOCOL)
        self.storages: list[StorageReference] = []
        self._num_named = 0
        """Values that have a number in the reader's memo."""
        self._numbers: dict[Any, int] = {}
        """Those that are referred to again: numbers by the object's id, or by a name."""
        self._keys: dict[int, str] = {}
        """Keys of the storages, by their ids."""

    def save(self, value: Any) -> None:
        """Write any value: a reference where it was written before."""
        kind = type(value)
        if value is None or kind is bool:
            self.out += b"N" if value is None else b"\x88" if value else b"\x89"
        elif kind is int:
            self.out += integer(value)
        elif kind is float:
            self.out += b"G" + struct.pack(">d", value)
        elif kind is tuple and not value:
            self.out += b")"
        elif not self._referred(id(value)):
            self._save_object(kind, value)

    def _save_object(self, kind: type, value: Any) -> None:
        if kind is str:
            self._text(value)
        elif kind is tuple:
            self._tuple(value)
        elif kind is list:
            self._put(b"]", id(value))
            self._items(b"a", b"e", [(item,) for item in value])
        elif kind is dict:
            self._put(b"}", id(value))
            self._items(b"s", b"u", list(value.items()), is_dict=True)
        elif kind is OrderedDict:
            self._ordered_dict(value)
        elif kind is TensorReference:
            self._tensor(value)
        else:
            raise TypeError(f"a {kind.__name__} cannot be saved in a .pt file")

    def _put(self, opcodes: bytes, key: Any = None) -> None:
        """Write what makes a value, and give it the next number; under a key if it may be referred to again."""
        number, self._num_named = self._num_named, self._num_named + 1
        if key is not None:
            self._numbers[key] = number
        self.out += opcodes
        self.out += b"q" + bytes([number]) if number < 256 else b"r" + struct.pack("<I", number)

    def _referred(self, key: Any) -> bool:
        """Write a reference to what has this key; False where nothing has."""
        number = self._numbers.get(key)
        if number is None:
            return False
        self.out += b"h" + bytes([number]) if number < 256 else b"j" + struct.pack("<I", number)
        return True

    def _name(self, name: Name) -> None:
        if not self._referred(name):
            self._put(f"c{name.module}\n{name.name}\n".encode(), name)

    def _text(self, text: str) -> None:
        content = text.encode()
        self._put(b"X" + struct.pack("<I", len(content)) + content, id(text))

    def _tuple(self, values: tuple[Any, ...]) -> None:
        """A tuple with a number of its own. Up to three values need no mark."""
        if len(values) > 3:
            self.out += b"("
        for value in values:
            self.save(value)
        self._put(tuple_opcode(len(values)), id(values))

    def _items(self, single: bytes, several: bytes, items: Sequence[tuple[Any, ...]], is_dict: bool = False) -> None:
        """The items of a list or a dict: one alone, or batches between marks. A dict whose last batch is full has an
        empty one behind it: that is how the pickler's loop ends."""
        if len(items) == 1:
            self._save_all(items)
            self.out += single
            return
        for batch in batches(items):
            self._batch(batch, several)
        if is_dict and items and len(items) % _BATCH == 0:
            self._batch((), several)

    def _batch(self, items: Iterable[tuple[Any, ...]], several: bytes) -> None:
        self.out += b"("
        self._save_all(items)
        self.out += several

    def _save_all(self, items: Iterable[tuple[Any, ...]]) -> None:
        for item in items:
            for value in item:
                self.save(value)

    def _ordered_dict(self, value: OrderedDict[Any, Any]) -> None:
        """Made empty, then filled as by an iterator, then given its attributes: each last item of many that is alone
        needs no mark."""
        self._name(ORDERED_DICT)
        self._put(b")R", id(value))
        for batch in batches(list(value.items())):
            if len(batch) == 1:
                self._save_all(batch)
                self.out += b"s"
            else:
                self._batch(batch, b"u")
        if vars(value):
            self.save(vars(value))
            self.out += b"b"

    def _hooks(self) -> None:
        """The empty OrderedDict that each tensor has of its own."""
        self._name(ORDERED_DICT)
        self._put(b")R")

    def _tensor(self, tensor: TensorReference) -> None:
        if not tensor.is_parameter:
            self._view(tensor, tensor.requires_grad, id(tensor))
            return
        self._name(PARAMETER)
        self._view(tensor, False)
        self.save(tensor.requires_grad)
        self._hooks()
        self._put(tuple_opcode(3))
        self._put(b"R", id(tensor))

    def _view(self, tensor: TensorReference, requires_grad: bool, key: int | None = None) -> None:
        """The call that makes a tensor, with its arguments. Their tuples are new for each one, equal or not."""
        is_untyped = tensor.storage.kind == UNTYPED
        self._name(TENSOR_V3 if is_untyped else TENSOR_V2)
        self.out += b"("
        self._storage(tensor.storage)
        self.save(tensor.offset)
        for numbers in (tensor.shape, tensor.strides):
            self._numbers_of(numbers)
        self.save(requires_grad)
        self._hooks()
        if is_untyped:
            self._name(_DTYPE_NAMES[tensor.dtype])
        self._put(b"t")
        self._put(b"R", key)

    def _numbers_of(self, numbers: tuple[int, ...]) -> None:
        if not numbers:
            self.out += b")"
            return
        mark = b"(" if len(numbers) > 3 else b""
        self._put(b"".join([mark, *map(integer, numbers), tuple_opcode(len(numbers))]))

    def _storage(self, storage: StorageReference) -> None:
        """The persistent id of a storage."""
        key = self._keys.get(id(storage))
        if key is None:
            key = self._keys[id(storage)] = str(len(self.storages))
            self.storages.append(storage)
        self.out += b"("
        self.save(LITERALS["storage"])
        self._name(_KIND_NAMES[storage.kind])
        if not self._referred(("key", key)):
            self._put(b"X" + struct.pack("<I", len(key)) + key.encode(), ("key", key))
        self.save(storage.location)
        self.save(storage.num_elements)
        self._put(b"t")
        self.out += b"Q"


def batches(items: Sequence[tuple[Any, ...]]) -> Iterator[list[tuple[Any, ...]]]:
    """The items, so many at a time as are written between two marks."""
    rest = iter(items)
    while batch := list(islice(rest, _BATCH)):
        yield batch


def tuple_opcode(length: int) -> bytes:
    """What makes a tuple of so many values: with a mark below them beyond three."""
    return {1: b"\x85", 2: b"\x86", 3: b"\x87"}.get(length, b"t")


def integer(value: int) -> bytes:
    """The shortest way to write an integer that protocol 2 has."""
    if 0 <= value < 1 << 8:
        return b"K" + bytes([value])
    if 0 <= value < 1 << 16:
        return b"M" + struct.pack("<H", value)
    if -1 << 31 <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    # One bit more for the sign; a negative number needs none where it is a power of two.
    nbytes = ((value if value >= 0 else ~value).bit_length() >> 3) + 1
    return b"\x8a" + bytes([nbytes]) + value.to_bytes(nbytes, "little", signed=True)
