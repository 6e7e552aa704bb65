"""StoredTensor, TensorFile: the contents of a safetensors file by its header; strict reading and packing of headers.

The format: 8 bytes with the header's length n (little endian), n bytes of JSON, then the tensors' bytes without gaps
(https://github.com/huggingface/safetensors, section Format).
"""
from __future__ import annotations

import errno
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stream_reshard.errors import Cause, ResourceError, SourceError, StreamReshardError, quoted
from stream_reshard.storage.dtypes import ITEMSIZE
from stream_reshard.storage.json_text import strict_json
from stream_reshard.storage.small_files import misplaced, open_regular, read_error

MAX_HEADER_NBYTES = 25_000_000
"""Limit of huggingface_hub; parsing a usual header takes some 14 times its size in memory."""

BLOCK_NBYTES = 4096
"""Size of the blocks that file systems clone: that of a memory page, on all that can clone."""

MIN_CLONED_NBYTES = 2 * BLOCK_NBYTES
"""Shorter stretches are copied: they may hold no whole block, and for a single one the call costs more than a copy."""

MAX_DIMS = 8
"""Most dims of a tensor; no weight has more."""

NO_HEADER = "files have no header that can be read"

_MAX_INTEGER = 1 << 48

_WORD = r"[A-Za-z0-9_][A-Za-z0-9_.\-+=@,() ]*"

SHARD_NAME = re.compile(rf"(?:{_WORD}/)*{_WORD}\.safetensors")
"""Path of a shard below the folder, with forward slashes; no part of it begins with a dot."""


@dataclass(frozen=True)
class StoredTensor:
    """An array stored in a file."""

    file: str
    """Path relative to the checkpoint's root, with forward slashes."""
    key: str
    """Its name in that file's header."""
    dtype: str
    """Name of safetensors, such as BF16."""
    shape: tuple[int, ...]
    """Extent per dim, in elements."""
    begin: int
    """First byte in the file, the header included."""

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return ITEMSIZE[self.dtype]

    @property
    def nbytes(self) -> int:
        """Its size, in bytes."""
        return math.prod(self.shape) * self.itemsize


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file, on disk or to be written."""

    path: str
    """Relative to the checkpoint's root, with forward slashes."""
    tensors: tuple[StoredTensor, ...]
    """In the order of their bytes."""
    metadata: tuple[tuple[str, str], ...] = ()
    """The header's `__metadata__`; empty also if it is absent."""

    @property
    def nbytes(self) -> int:
        """Size of the whole file, in bytes."""
        return self.tensors[-1].begin + self.tensors[-1].nbytes


def pack_header(tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str],
                begin: int = 0) -> bytes:
    """The bytes of a file of tensors (key, dtype, shape) before the data of the first tensor.

    Deterministic: keys in the given order, JSON without spaces, padded with spaces to a multiple of 8 bytes, or up to
    byte `begin` of the file if that is more.
    """
    table: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for key, dtype, shape in tensors:
        offset, end = end, end + math.prod(shape) * ITEMSIZE[dtype]
        table[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * max(-len(text) % 8, begin - 8 - len(text))
    return len(text).to_bytes(8, "little") + text


def planned_file(path: str, tensors: Sequence[tuple[str, str, tuple[int, ...]]],
                 metadata: Mapping[str, str]) -> TensorFile:
    """The file of tensors (key, dtype, shape) that begins with `pack_header` of them."""
    begin = len(pack_header(tensors, metadata))
    stored = []
    for key, dtype, shape in tensors:
        stored.append(StoredTensor(path, key, dtype, tuple(shape), begin))
        begin += stored[-1].nbytes
    return TensorFile(path, tuple(stored), tuple(metadata.items()))


def placed(file: TensorFile, path: str, begin: int) -> TensorFile:
    """`file` under another path, with a header padded so that the data begin at byte `begin`."""
    shift = begin - file.tensors[0].begin
    return TensorFile(path, tuple(StoredTensor(path, tensor.key, tensor.dtype, tensor.shape, tensor.begin + shift)
                                  for tensor in file.tensors), file.metadata)


def header_of(file: TensorFile) -> bytes:
    """The bytes of a planned file before the data of its first tensor."""
    return pack_header([(tensor.key, tensor.dtype, tensor.shape) for tensor in file.tensors], dict(file.metadata),
                       file.tensors[0].begin)


def read_header(root: Path, path: str, max_nbytes: int = MAX_HEADER_NBYTES) -> TensorFile:
    """Read and check the header of `root / path`, of at most `max_nbytes` (the room in memory); see `parse_header`.

    Raises, with the file's name: Cause if something else stands in place of the file, or it is cut off; SourceError for
    any other fault; ResourceError if the header is longer than `max_nbytes`.
    """
    try:
        with open_regular(root / path) as stream:
            size = os.fstat(stream.fileno()).st_size
            return parse_header(path, _header_text(stream.read(8), size, max_nbytes, stream.read), size, root / path)
    except OSError as error:
        fault: StreamReshardError = read_error(quoted(path), error)
    except _Malformed as error:
        fault = error.as_error(path)
    except _NoRoom as error:
        raise ResourceError(f"{quoted(path)}: {error}") from error
    except SourceError as error:
        fault = error
    fault.kind = fault.kind or NO_HEADER
    raise misplaced(root, path, "weights") or fault


def parse_header(path: str, text: bytes, size: int, full: Path | None = None) -> TensorFile:
    """The tensors of a file of `size` bytes, from the JSON text of its header. `full`: the file's path on disk, if any.

    Both the reader below and that of safetensors must accept the header. Raises SourceError, with the file's name, for
    anything that the format forbids, also if other readers accept it: a key that occurs twice, an unknown field, a
    header that does not start with `{`, bytes after the last tensor.
    """
    try:
        file = _parsed(path, text, size)
    except _CutOff as error:
        raise error.as_error(path) from error
    except (_Malformed, ValueError, RecursionError) as error:
        raise SourceError(f"{quoted(path)}: not a valid safetensors header: {error}") from error
    _check_with_library(path, text, size, full)
    return file


class _Malformed(Exception):
    """A fault of a header; its text does not name the file."""

    def as_error(self, path: str) -> SourceError:
        """The error for the user, with the file's name."""
        return SourceError(f"{quoted(path)}: {self}")


class _CutOff(_Malformed):
    """A file that is shorter than its header requires."""

    def __init__(self, what: str, wanted: int, size: int):
        super().__init__(f"cut off: {what} {wanted} bytes, the file has {size}; {wanted - size} bytes are missing, "
                         f"download it again")

    def as_error(self, path: str) -> SourceError:
        return Cause(f"{quoted(path)}: {self}", kind="files are cut off")


class _NoRoom(Exception):
    """A header that is too long for the allowed memory."""


def _header_text(prefix: bytes, size: int, max_nbytes: int, read: Callable[[int], bytes]) -> bytes:
    """The JSON text of a header, from the first 8 bytes of a file of `size` bytes and a function that reads on."""
    if len(prefix) < 8:
        raise _Malformed(f"{size} bytes are too few for a safetensors file")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_NBYTES:
        raise _Malformed(f"its header claims {length} bytes, the limit is {MAX_HEADER_NBYTES}")
    if 8 + length > size:
        raise _CutOff("the header alone needs", 8 + length, size)
    if length > max_nbytes:
        raise _NoRoom(f"its header claims {length} bytes, the limit is {max_nbytes}; parsing it takes many times that, "
                      f"raise --max-memory")
    return read(length)


def _parsed(path: str, text: bytes, size: int) -> TensorFile:
    """Raises _Malformed, or an error of the JSON reader."""
    if text[:1] != b"{":
        raise _Malformed("it does not start with '{'")
    table = strict_json(text)
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _Malformed("__metadata__ must be an object of strings")
    if not table:
        raise _Malformed("it names no tensor")
    begin = 8 + len(text)
    entries = sorted(((key, *_entry(key, value)) for key, value in table.items()), key=lambda entry: entry[3:])
    tensors, end = [], 0
    for key, dtype, shape, offset, stop in entries:
        if offset != end:
            raise _Malformed(f"{quoted(key)} begins at byte {offset} of the data, the tensor before it ends at {end}")
        tensors.append(StoredTensor(path, key, dtype, shape, begin + offset))
        end = stop
    if begin + end > size:
        raise _CutOff("the header describes", begin + end, size)
    if begin + end < size:
        raise _Malformed(f"the header describes {begin + end} bytes, the file has {size}")
    return TensorFile(path, tuple(tensors), tuple(metadata.items()))


def _entry(key: str, value: Any) -> tuple[str, tuple[int, ...], int, int]:
    """(dtype, shape, begin, end) of one tensor, checked against each other; byte 0 is where the data begin."""
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise _Malformed(f"{quoted(key)} must have dtype, shape and data_offsets, and nothing else")
    shape, offsets, dtype = value["shape"], value["data_offsets"], value["dtype"]
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < _MAX_INTEGER for n in numbers):
            raise _Malformed(f"{quoted(key)} has a shape or offsets that are not plain sizes")
    if not isinstance(dtype, str) or dtype not in ITEMSIZE:
        raise _Malformed(f"{quoted(key)} has the unsupported dtype {quoted(dtype)}")
    if len(shape) > MAX_DIMS:
        raise _Malformed(f"{quoted(key)} has {len(shape)} dims, the limit is {MAX_DIMS}")
    nbytes = math.prod(shape) * ITEMSIZE[dtype]
    if len(offsets) != 2 or offsets[1] - offsets[0] != nbytes:
        raise _Malformed(f"{quoted(key)} of {nbytes} bytes has the offsets {quoted(offsets[:3])}")
    return dtype, tuple(shape), offsets[0], offsets[1]


def _check_with_library(path: str, text: bytes, size: int, full: Path | None) -> None:
    """Raises SourceError if safetensors refuses the header. It maps the file that it opens, and a mapped file that
    somebody cuts off would kill the process: so it gets a copy in an anonymous sparse file of `size` bytes. A limit on
    file sizes (ulimit -f) can forbid that; safetensors then reads the file at `full`."""
    from safetensors import SafetensorError, safe_open
    descriptor = os.memfd_create("header", os.MFD_CLOEXEC)
    try:
        try:
            os.write(descriptor, len(text).to_bytes(8, "little") + text)
            os.ftruncate(descriptor, size)
            opened: str | Path = f"/proc/self/fd/{descriptor}"
        except OSError as error:
            if full is None or error.errno != errno.EFBIG:
                raise
            opened = full
        with safe_open(opened, framework="np"):
            pass
    except (SafetensorError, OSError) as error:
        raise SourceError(f"{quoted(path)}: safetensors refuses it: {error}") from error
    finally:
        os.close(descriptor)
