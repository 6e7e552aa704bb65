"""The names that a .pt file may use, and what is made where torch would call them. No name is ever looked up."""
from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from stream_reshard.errors import quoted
from stream_reshard.storage.dtypes import ITEMSIZE
from stream_reshard.storage.torch_values import (STORAGE_DTYPES, UNTYPED, UNTYPED_DTYPES, StorageReference,
                                                 TensorReference)

MAX_DIMS = 8
"""No weight has more."""

MAX_INTEGER = 1 << 48
"""Of sizes, offsets and strides, in elements."""

_MAX_KEY_LENGTH = 20
"""Digits of a storage's number: torch 1.6 to 1.9 took an address for it."""


_LOCATION = re.compile(r"[a-z][a-z0-9_]{,31}(:[0-9]{1,5})?")
"""A device, with its number where there are several (torch/serialization.py, location_tag)."""


@dataclass(frozen=True)
class Name:
    """A name in a module; nothing but the words."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


ORDERED_DICT = Name("collections", "OrderedDict")
TENSOR_V2 = Name("torch._utils", "_rebuild_tensor_v2")
TENSOR_V3 = Name("torch._utils", "_rebuild_tensor_v3")
PARAMETER = Name("torch._utils", "_rebuild_parameter")

STORAGES: Mapping[Name, str] = {
    Name("torch.storage" if kind == UNTYPED else "torch", kind): kind for kind in STORAGE_DTYPES}
"""Classes of storages, and their names without the module."""

DTYPES: Mapping[Name, str] = {Name("torch", name): dtype for name, dtype in UNTYPED_DTYPES.items()}
"""Dtypes, and their safetensors names."""


def storage_of(identity: Any) -> StorageReference:
    """The storage that a persistent id stands for: ("storage", class, key, location, number of elements), as
    torch/serialization.py, persistent_id. Raises ValueError."""
    if type(identity) is not tuple or len(identity) != 5 or identity[0] != "storage":
        raise ValueError("it refers to something else than a storage of tensors")
    _, kind, key, location, num_elements = identity
    if not isinstance(kind, Name) or kind not in STORAGES:
        raise ValueError(f"a storage has the class {told(kind)}")
    if type(key) is not str or not (key.isascii() and key.isdigit() and len(key) <= _MAX_KEY_LENGTH):
        raise ValueError(f"a storage has the key {told(key)}, which is no number")
    if type(location) is not str or not _LOCATION.fullmatch(location) or not is_size(num_elements):
        raise ValueError(f"the storage {key} has {told(num_elements)} elements on {told(location)}")
    return StorageReference(STORAGES[kind], key, num_elements, location)


def is_size(value: Any) -> bool:
    """True for a plain number of elements that a file may hold."""
    return type(value) is int and 0 <= value < MAX_INTEGER


def is_shape(value: Any) -> bool:
    """True for a tuple of such numbers, not too long."""
    return type(value) is tuple and len(value) <= MAX_DIMS and all(map(is_size, value))


def told(value: Any) -> str:
    """A value for people, where it is a text, a number or a name; of any other its type: a few bytes can describe a
    tree that is endless when it is printed."""
    return quoted(value) if isinstance(value, (str, int, Name)) else f"a {type(value).__name__}"


def _ordered_dict(arguments: tuple[Any, ...]) -> OrderedDict[Any, Any]:
    if arguments:
        raise ValueError("an OrderedDict is made of something, where torch.save makes it empty and fills it")
    return OrderedDict()


def _tensor_v2(arguments: tuple[Any, ...]) -> TensorReference:
    """(storage, offset, shape, strides, requires_grad, hooks); a seventh are bits of a view (torch/_utils.py)."""
    if len(arguments) != 6:
        raise ValueError("a tensor has more than a storage and a place in it: a conjugate or negative view perhaps, of "
                         "which the file does not hold the numbers themselves")
    storage = arguments[0]
    if not isinstance(storage, StorageReference) or storage.kind == UNTYPED:
        raise ValueError("a tensor has no storage with a dtype")
    return _tensor(storage, STORAGE_DTYPES[storage.kind], *arguments[1:])


def _tensor_v3(arguments: tuple[Any, ...]) -> TensorReference:
    """The same with a dtype behind them, of a storage that has none (torch/_utils.py)."""
    if len(arguments) != 7 or not isinstance(arguments[6], Name) or arguments[6] not in DTYPES:
        raise ValueError("a tensor without a class of storages has no dtype that is known")
    if not isinstance(arguments[0], StorageReference) or arguments[0].kind != UNTYPED:
        raise ValueError(f"a tensor of {arguments[6]} has no storage of bytes")
    return _tensor(arguments[0], DTYPES[arguments[6]], *arguments[1:6])


def _tensor(storage: StorageReference, dtype: str, offset: Any, shape: Any, strides: Any, requires_grad: Any,
            hooks: Any) -> TensorReference:
    """A tensor, its numbers checked against each other and against its storage."""
    if not is_size(offset) or not is_shape(shape) or not is_shape(strides) or len(shape) != len(strides):
        raise ValueError(f"a tensor in the storage {storage.key} has an offset, a shape or strides that are not plain "
                         f"sizes, or more than {MAX_DIMS} dims")
    if type(requires_grad) is not bool or not isinstance(hooks, OrderedDict) or hooks:
        raise ValueError(f"a tensor in the storage {storage.key} has hooks")
    tensor = TensorReference(storage, dtype, offset, shape, strides, requires_grad)
    if tensor.num_elements >= MAX_INTEGER:
        raise ValueError(f"a tensor in the storage {storage.key} has the shape {shape}, the limit is {MAX_INTEGER} "
                         f"elements")
    if tensor.end * ITEMSIZE[dtype] > storage.nbytes:
        raise ValueError(f"a tensor of shape {shape} and strides {strides} at {offset} ends at element {tensor.end} of "
                         f"the storage {storage.key}, which has {storage.nbytes // ITEMSIZE[dtype]}")
    return tensor


def _parameter(arguments: tuple[Any, ...]) -> TensorReference:
    """(tensor, requires_grad, hooks) (torch/_utils.py, _rebuild_parameter)."""
    if len(arguments) != 3 or not isinstance(arguments[0], TensorReference) or type(arguments[1]) is not bool:
        raise ValueError("a parameter is made of something else than a tensor")
    data, requires_grad, hooks = arguments
    if not isinstance(hooks, OrderedDict) or hooks:
        raise ValueError("a parameter has hooks")
    return TensorReference(data.storage, data.dtype, data.offset, data.shape, data.strides, requires_grad, True)


MAKERS: Mapping[Name, Callable[[tuple[Any, ...]], Any]] = {
    ORDERED_DICT: _ordered_dict, TENSOR_V2: _tensor_v2, TENSOR_V3: _tensor_v3, PARAMETER: _parameter}
"""What stands for a call of a function with these arguments. Each raises ValueError, in words."""

NAMES: Mapping[tuple[str, str], Name] = {
    (name.module, name.name): name for name in (*MAKERS, *STORAGES, *DTYPES)}
"""Every name that is accepted."""
