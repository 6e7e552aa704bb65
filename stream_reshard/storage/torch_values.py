"""StorageReference, TensorReference: what a .pt file holds beside plain values; sizes and places, without bytes."""
from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from stream_reshard.storage.dtypes import ITEMSIZE

STORAGE_DTYPES: Mapping[str, str] = {
    "FloatStorage": "F32", "BFloat16Storage": "BF16", "HalfStorage": "F16", "DoubleStorage": "F64",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL", "ComplexFloatStorage": "C64", "UntypedStorage": "U8"}
"""Classes of storages (torch/storage.py, _dtype_to_storage_type_map), and the dtype of their elements under its
safetensors name. An untyped one is counted in bytes."""

UNTYPED = "UntypedStorage"

UNTYPED_DTYPES: Mapping[str, str] = {
    "uint16": "U16", "uint32": "U32", "uint64": "U64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0"}
"""torch's names of dtypes that have no class of storages (torch/storage.py, _new_dtypes): tensors of them refer to an
untyped one and name their dtype (torch/_utils.py, _rebuild_tensor_v3)."""

LITERALS: Mapping[str, str] = {"storage": "storage", "cpu": "cpu"}
"""Texts that torch has as literals (torch/serialization.py). Of each Python keeps one object, and a pickle refers to an
object that it met before, so they must be one object here."""

_KINDS = {dtype: kind for kind, dtype in STORAGE_DTYPES.items() if kind != UNTYPED}


@dataclass(frozen=True, slots=True)
class StorageReference:
    """A storage: elements of one dtype in a row, in a record of their own. Tensors that share it refer to one object;
    who writes a file takes two objects for two storages, equal or not."""

    kind: str
    """torch's name of its class."""
    key: str
    """Its record's name below data/; who writes a file numbers storages anew."""
    num_elements: int
    """Bytes where it is untyped."""
    location: str = LITERALS["cpu"]
    """Device it was on, such as cuda:0."""

    @property
    def nbytes(self) -> int:
        """Bytes it takes in the file."""
        return self.num_elements * ITEMSIZE[STORAGE_DTYPES[self.kind]]


@dataclass(frozen=True, slots=True)
class TensorReference:
    """A tensor: a view of a storage."""

    storage: StorageReference
    dtype: str
    """Under its safetensors name, such as BF16."""
    offset: int
    """Its first element's place in the storage, in elements of its own dtype."""
    shape: tuple[int, ...]
    """Extent per dim, in elements."""
    strides: tuple[int, ...]
    """Distance of neighbours per dim, in elements."""
    requires_grad: bool = False
    is_parameter: bool = False
    """Saved as a torch.nn.Parameter."""

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return ITEMSIZE[self.dtype]

    @property
    def num_elements(self) -> int:
        """Elements of the tensor; more than the storage has where dims are expanded (stride 0)."""
        return math.prod(self.shape)

    @property
    def end(self) -> int:
        """Past the last element that it reaches in the storage, in elements of its own dtype."""
        if not self.num_elements:
            return self.offset
        return self.offset + 1 + sum((extent - 1) * stride for extent, stride in zip(self.shape, self.strides))

    @property
    def is_contiguous(self) -> bool:
        """Its elements stand in the storage one behind the other, in C order. Strides of dims with one element do not
        count (c10/core/Contiguity.h)."""
        return not self.num_elements or all(
            extent == 1 or stride == wanted
            for extent, stride, wanted in zip(self.shape, self.strides, strides_of(self.shape)))


def strides_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides that torch gives a new tensor: those of C order, an empty dim counted as one element."""
    strides = [1]
    for extent in reversed(shape[1:]):
        strides.append(strides[-1] * max(extent, 1))
    return tuple(reversed(strides)) if shape else ()


def new_storage(dtype: str, num_elements: int) -> StorageReference:
    """A storage for elements of a dtype, as torch makes one on the CPU."""
    kind = _KINDS.get(dtype, UNTYPED)
    return StorageReference(kind, "", num_elements if kind != UNTYPED else num_elements * ITEMSIZE[dtype])


def new_tensor(dtype: str, shape: tuple[int, ...], storage: StorageReference | None = None, offset: int = 0,
               requires_grad: bool = False) -> TensorReference:
    """A contiguous tensor, by default with a storage of its own."""
    storage = storage or new_storage(dtype, math.prod(shape))
    return TensorReference(storage, dtype, offset, shape, strides_of(shape), requires_grad)
