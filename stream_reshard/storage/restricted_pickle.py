"""Pickles of torch.save as plain values, read by an interpreter that imports nothing and calls nothing.

The language is that of Lib/pickletools.py, of which torch.save writes a part of protocol 2, and few names
(`torch_names`). A pickle of another one is refused by what it holds. The work and the memory that a pickle causes are
bounded by its length: containers are counted, what is shared is followed only so far, and nothing contains itself.
"""
from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from stream_reshard.errors import quoted
from stream_reshard.storage.torch_names import MAKERS, NAMES, ORDERED_DICT, Name, storage_of, told
from stream_reshard.storage.torch_values import LITERALS, StorageReference
from stream_reshard.storage.value_tree import MAX_DEPTH, check_tree

PROTOCOL = b"\x80\x02"
"""PROTO and the protocol that torch.save writes (torch/serialization.py, DEFAULT_PROTOCOL)."""

MAX_MARKS = 4 * MAX_DEPTH
"""Marks that are open at a time: a tensor has two of its own, a container one."""

MAX_TEXT_NBYTES = 1 << 16
"""Of a string: a parameter's name has some hundred."""

MAX_INT_NBYTES = 9
"""Of an integer beyond 32 bits: all signed and unsigned ones of 64 bits."""

_MAX_NAME_NBYTES = 200
_FEW = 1000
"""Containers that a short pickle may have, however short."""
_NBYTES_PER_CONTAINER = 6
"""The least that a pickler writes for a container: an opcode, and five bytes that number it."""
_NBYTES_PER_DICT = 48
"""The same for an OrderedDict: torch gives one to each tensor, which takes more."""
_MAX_REPEATS = 16
"""Values that a tree may have per byte of its pickle, when what is shared counts each time."""

_STOP = ord(".")


def read_pickle(text: bytes) -> tuple[Any, dict[str, StorageReference]]:
    """The value of a pickle: dicts, OrderedDicts, lists, tuples, plain values and tensors, one object for what is one
    object in it; and its storages by their keys, in the order in which it names them. Raises ValueError."""
    interpreter = _Interpreter(text)
    try:
        value = interpreter.run()
    except IndexError as error:
        raise ValueError(f"its pickle is cut off, or takes a value where there is none, at byte {interpreter.at}"
                         ) from error
    check_tree(value, _FEW + _MAX_REPEATS * len(text))
    return value, interpreter.storages


class _Interpreter:
    """A machine with a stack, a stack of marks and a memo, as pickle describes it."""

    def __init__(self, text: bytes):
        self.text, self.at = text, 0
        """`at`: offset of the next byte to be read."""
        self.storages: dict[str, StorageReference] = {}
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []
        """What lies below each open mark."""
        self._memo: dict[int, Any] = {}
        self._room = _FEW + len(text) // _NBYTES_PER_CONTAINER
        self._room_for_dicts = _FEW + len(text) // _NBYTES_PER_DICT

    def run(self) -> Any:
        """The value that the pickle leaves on the stack."""
        text = self.text
        if text[:2] != PROTOCOL:
            raise ValueError(f"its pickle begins with the bytes {text[:2].hex()}, where torch.save writes protocol "
                             f"2 ({PROTOCOL.hex()}); load it with torch and save it again without pickle_protocol")
        self.at = 2
        while True:
            opcode = text[self.at]
            self.at += 1
            step = _STEPS.get(opcode)
            if step is None:
                break
            step(self)
        if opcode != _STOP:
            raise ValueError(f"its pickle has the opcode {opcode:#04x} at byte {self.at - 1}, which "
                             f"torch.save does not write")
        if self.at != len(text) or len(self._stack) != 1 or self._below:
            raise ValueError(f"its pickle ends at byte {self.at} of {len(text)} with {len(self._stack)} values, where "
                             f"it should end with one")
        return self._stack[0]

    def _take(self, nbytes: int) -> bytes:
        taken = self.text[self.at:self.at + nbytes]
        if len(taken) < nbytes:
            raise IndexError
        self.at += nbytes
        return taken

    def _make(self, value: Any) -> None:
        """Push a new container, as long as there is room for one."""
        self._room -= 1
        if self._room < 0:
            raise ValueError(f"its pickle makes more containers than one of {len(self.text)} bytes has room for")
        self._stack.append(value)

    def _marked(self) -> list[Any]:
        """What lies above the last mark, which goes with it."""
        items, self._stack = self._stack, self._below.pop()
        return items

    def mark(self) -> None:
        if len(self._below) >= MAX_MARKS:
            raise ValueError(f"its values are nested more than {MAX_DEPTH} deep")
        self._below.append(self._stack)
        self._stack = []

    def empty_tuple(self) -> None:
        self._stack.append(())

    def empty_list(self) -> None:
        self._make([])

    def empty_dict(self) -> None:
        self._make({})

    def tuple_(self) -> None:
        items = self._marked()
        self._make(tuple(items))

    def tuple_of(self, count: int) -> None:
        if len(self._stack) < count:
            raise IndexError
        items = tuple(self._stack[-count:])
        del self._stack[-count:]
        self._make(items)

    def append(self) -> None:
        item = self._stack.pop()
        self._list().append(item)

    def appends(self) -> None:
        items = self._marked()
        self._list().extend(items)

    def _list(self) -> list[Any]:
        found = self._stack[-1]
        if type(found) is not list:
            raise ValueError(f"its pickle appends to a {type(found).__name__}")
        return found

    def setitem(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set([key, value])

    def setitems(self) -> None:
        self._set(self._marked())

    def _set(self, items: list[Any]) -> None:
        found = self._stack[-1]
        if not isinstance(found, dict) or len(items) % 2:
            raise ValueError(f"its pickle sets an item of a {type(found).__name__}")
        for key, value in zip(items[::2], items[1::2]):
            if type(key) not in (str, int):
                raise ValueError(f"its pickle has a {type(key).__name__} as a key, where names and numbers are")
            if key in found:
                raise ValueError(f"the key {quoted(key)} occurs twice in its pickle")
            found[key] = value

    def text_(self) -> None:
        nbytes, = struct.unpack("<I", self._take(4))
        if nbytes > MAX_TEXT_NBYTES:
            raise ValueError(f"its pickle has a text of {nbytes} bytes, the limit is {MAX_TEXT_NBYTES}")
        try:
            text = self._take(nbytes).decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"its pickle has a text that is not UTF-8 at byte {self.at - nbytes}") from error
        self._stack.append(LITERALS.get(text, text))

    def number(self, format_: struct.Struct) -> None:
        self._stack.append(format_.unpack(self._take(format_.size))[0])

    def long(self) -> None:
        nbytes = self._take(1)[0]
        if nbytes > MAX_INT_NBYTES:
            raise ValueError(f"its pickle has an integer of {nbytes} bytes, the limit is {MAX_INT_NBYTES}")
        self._stack.append(int.from_bytes(self._take(nbytes), "little", signed=True))

    def constant(self, value: bool | None) -> None:
        self._stack.append(value)

    def put(self, format_: struct.Struct) -> None:
        self._memo[format_.unpack(self._take(format_.size))[0]] = self._stack[-1]

    def get(self, format_: struct.Struct) -> None:
        index = format_.unpack(self._take(format_.size))[0]
        if index not in self._memo:
            raise ValueError(f"its pickle refers to the value {index}, which it has not named, at byte {self.at}")
        self._stack.append(self._memo[index])

    def name(self) -> None:
        """Push a name. The words are read; the thing is not."""
        words = []
        for _ in range(2):
            end = self.text.find(b"\n", self.at, self.at + _MAX_NAME_NBYTES + 1)
            if end < 0:
                raise ValueError(f"its pickle has a name of more than {_MAX_NAME_NBYTES} bytes at byte {self.at}")
            words.append(self._take(end - self.at).decode("utf-8", "backslashreplace"))
            self.at += 1
        if (words[0], words[1]) not in NAMES:
            raise ValueError(f"its pickle holds {quoted('.'.join(words))}, which is no tensor and no plain value; "
                             f"names can run code, so none but those of tensors are read; where you trust it, load it "
                             f"with torch and save its tensors alone, best as safetensors")
        self._stack.append(NAMES[words[0], words[1]])

    def reduce(self) -> None:
        """Make what a name stands for, of arguments. Nothing is called but the makers of `torch_names`."""
        arguments, function = self._stack.pop(), self._stack.pop()
        if not isinstance(function, Name) or function not in MAKERS or type(arguments) is not tuple:
            raise ValueError(f"its pickle calls {told(function)}, which is no function that makes a tensor")
        if function == ORDERED_DICT:
            self._room_for_dicts -= 1
            if self._room_for_dicts < 0:
                raise ValueError(f"its pickle makes more dicts than one of {len(self.text)} bytes has room for")
        self._stack.append(MAKERS[function](arguments))

    def build(self) -> None:
        """Give the dict of a module's state what torch.nn.Module.state_dict notes beside it."""
        state, found = self._stack.pop(), self._stack[-1]
        if type(found) is not OrderedDict or type(state) is not dict or set(state) != {"_metadata"}:
            raise ValueError(f"its pickle gives a {type(found).__name__} attributes, where only the dict of a model "
                             f"has _metadata")
        vars(found).update(state)

    def storage(self) -> None:
        storage = storage_of(self._stack.pop())
        known = self.storages.setdefault(storage.key, storage)
        if known != storage:
            raise ValueError(f"the storage {storage.key} is described twice, as {known} and as {storage}")
        self._stack.append(known)


_BYTE, _SHORT, _INT, _UINT, _DOUBLE = map(struct.Struct, ("<B", "<H", "<i", "<I", ">d"))

_STEPS: Mapping[int, Callable[[_Interpreter], None]] = {ord(sign): step for sign, step in {
    "(": _Interpreter.mark, ")": _Interpreter.empty_tuple, "]": _Interpreter.empty_list, "}": _Interpreter.empty_dict,
    "t": _Interpreter.tuple_, "\x85": lambda self: self.tuple_of(1), "\x86": lambda self: self.tuple_of(2),
    "\x87": lambda self: self.tuple_of(3), "a": _Interpreter.append, "e": _Interpreter.appends,
    "s": _Interpreter.setitem, "u": _Interpreter.setitems, "X": _Interpreter.text_, "\x8a": _Interpreter.long,
    "K": lambda self: self.number(_BYTE), "M": lambda self: self.number(_SHORT), "J": lambda self: self.number(_INT),
    "G": lambda self: self.number(_DOUBLE), "N": lambda self: self.constant(None),
    "\x88": lambda self: self.constant(True), "\x89": lambda self: self.constant(False),
    "q": lambda self: self.put(_BYTE), "r": lambda self: self.put(_UINT), "h": lambda self: self.get(_BYTE),
    "j": lambda self: self.get(_UINT), "c": _Interpreter.name, "R": _Interpreter.reduce, "b": _Interpreter.build,
    "Q": _Interpreter.storage}.items()}
"""What each opcode does, all but STOP."""
