"""A .pt file as torch.save writes it, read without torch: its values, and where the bytes of its tensors stand.

The format (torch/serialization.py, _save and _load): a zip whose records lie below one folder: data.pkl holds the
values, data/0, data/1 ... the storages' bytes, byteorder and version small texts. Names that begin with a dot are notes
for torch. The bytes of tensors are never read here.
"""
from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from stream_reshard.errors import Cause, ResourceError, SourceError, StreamReshardError, quoted
from stream_reshard.storage.header import StoredTensor
from stream_reshard.storage.restricted_pickle import read_pickle
from stream_reshard.storage.small_files import misplaced, open_regular, read_error
from stream_reshard.storage.torch_values import StorageReference, TensorReference
from stream_reshard.storage.torch_weights import TorchWeights
from stream_reshard.storage.zip_file import Member, NoEnd, NoRoom, ReadAt, read_members

MAX_PICKLE_NBYTES = 32 * 2**20
"""Cap on data.pkl and on the directory: 100,000 tensors take some 11 MB. Reading takes some 20 times as much memory; of
a hostile file at most 40 times."""

_VERSIONS = range(1, 11)
"""Of the container (caffe2/serialize/versions.h, kMinSupportedFileFormatVersion to kMaxSupportedFileFormatVersion)."""

_NOTES = frozenset({".format_version", ".storage_alignment", ".data/serialization_id"})
"""Records that torch reads and that mean nothing here."""

_SMALL_NBYTES = 64
"""Cap on the texts of a file."""

_ZIP = b"PK\x03\x04"
_LEGACY = (b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19", b"\x80\x02ctorch")
"""First bytes before torch 1.6: the magic number of _legacy_save, pickled; or a pickle of a module itself."""
_TAR, _TAR_AT = b"ustar", 257
"""Before torch 0.1.10, a tar archive (torch/serialization.py, legacy_load)."""

_AGAIN = "load it with torch 1.6 or newer where you trust it, and save it again, best as safetensors"

NO_TORCH_FILE = "files are no checkpoints of torch that can be read"


@dataclass(frozen=True)
class TorchFile:
    """A .pt file, on disk."""

    path: str
    """Relative to the checkpoint's root, with forward slashes."""
    folder: str
    """Name of the folder in the archive, below which its records lie; the file's stem when it was saved."""
    contents: Any
    """The value that was saved, with a TensorReference in the place of each tensor. What was one object is one."""
    records: Mapping[StorageReference, Member]
    """Place of the bytes of each storage, in the order in which the values name them."""
    nbytes: int
    """Size of the whole file, in bytes."""

    def begin_of(self, tensor: TensorReference) -> int:
        """Offset of a tensor's first element in the file, in bytes. The next along a dim stands strides[dim] elements
        behind it."""
        return self.records[tensor.storage].begin + tensor.offset * tensor.itemsize

    def stored(self, key: str, tensor: TensorReference) -> StoredTensor | None:
        """The tensor as one that stands in one piece, under a name; None where it does not."""
        if not tensor.is_contiguous:
            return None
        return StoredTensor(self.path, key, tensor.dtype, tensor.shape, self.begin_of(tensor))

    def weights(self) -> TorchWeights:
        """The tensors of a dict of weights, by name, in the order of their bytes. Some may share bytes.

        Raises SourceError where it is no such dict.
        """
        where = quoted(self.path)
        if not isinstance(self.contents, dict):
            raise SourceError(f"{where} holds a {type(self.contents).__name__}, not a dict of weights",
                              kind=NO_TORCH_FILE)
        found, strides = [], {}
        for key, value in self.contents.items():
            if not isinstance(key, str) or not isinstance(value, TensorReference):
                raise SourceError(f"{where}: {quoted(key)} is a {type(value).__name__}, where a dict of weights has "
                                  f"names and tensors", kind=NO_TORCH_FILE)
            found.append(StoredTensor(self.path, key, value.dtype, value.shape, self.begin_of(value)))
            if not value.is_contiguous:
                strides[key] = value.strides
        if not found:
            raise SourceError(f"{where} names no tensor", kind=NO_TORCH_FILE)
        found.sort(key=lambda tensor: (tensor.begin, tensor.nbytes))
        return TorchWeights(self.path, tuple(found), (), strides, self.nbytes)


def read_torch_file(root: Path, path: str, max_nbytes: int = MAX_PICKLE_NBYTES) -> TorchFile:
    """The values of `root / path` and the places of its tensors, from a directory and a pickle of at most `max_nbytes`
    each.

    Raises SourceError, with the file's name, for anything that torch.save does not write or that is not read here;
    Cause where something else stands in its place, or it is cut off; ResourceError where the pickle has more than
    `max_nbytes`, which the memory has room for.
    """
    try:
        with open_regular(root / path) as stream:
            return _read(stream, path, max_nbytes)
    except OSError as error:
        fault: StreamReshardError = misplaced(root, path, None) or read_error(quoted(path), error)
    except _NoZip as error:
        fault = error.told(path) or misplaced(root, path, "weights") or SourceError(
            f"{quoted(path)}: it is no zip file, as torch.save writes it")
    except NoRoom as error:
        fault = ResourceError(f"{quoted(path)}: {error}; parsing it takes many times that, raise --max-memory")
    except NoEnd as error:
        fault = Cause(f"{quoted(path)}: {error}; download or save it again", kind="files are cut off")
    except ValueError as error:
        fault = SourceError(f"{quoted(path)}: {error}")
    fault.kind = fault.kind or NO_TORCH_FILE
    raise fault


class _NoZip(Exception):
    """That a file does not begin as a zip file does; its first bytes."""

    def told(self, path: str) -> SourceError | None:
        """The error a user sees, where the file is one of an older torch."""
        head = self.args[0]
        if head.startswith(_LEGACY) or head[_TAR_AT:].startswith(_TAR):
            return Cause(f"{quoted(path)} was saved by a torch before 1.6, or in its way, which is not read; {_AGAIN}",
                         kind="files have the format of torch before 1.6")
        return None


def _read(stream: BinaryIO, path: str, max_nbytes: int) -> TorchFile:
    descriptor, limit = stream.fileno(), min(max_nbytes, MAX_PICKLE_NBYTES)
    size = os.fstat(descriptor).st_size

    def read_at(offset: int, nbytes: int) -> bytes:
        content = os.pread(descriptor, nbytes, offset)
        if len(content) < nbytes:
            raise ValueError(f"it ends within the {nbytes} bytes at {offset}; did it change meanwhile?")
        return content

    head = os.pread(descriptor, _TAR_AT + len(_TAR), 0)
    if not head.startswith(_ZIP):
        raise _NoZip(head)
    folder, records = _below_folder(read_members(read_at, size, limit))
    _check_small(read_at, records)
    contents, storages = read_pickle(_content(read_at, records, "data.pkl", limit))
    return TorchFile(path, folder, contents, _places(records, storages), size)


def _below_folder(members: Mapping[str, Member]) -> tuple[str, dict[str, Member]]:
    """(the folder that all members lie in, the members by their names below it)."""
    folder = next(iter(members), "").partition("/")[0]
    records = {}
    for name, member in members.items():
        above, slash, below = name.partition("/")
        if above != folder or not slash:
            raise ValueError(f"its records {quoted(next(iter(members)))} and {quoted(name)} are not in one folder")
        records[below] = member
    for name in records:
        if name not in ("data.pkl", "byteorder", "version") and not name.startswith((".", "data/")):
            what = "a program of TorchScript" if "constants.pkl" in records else "no checkpoint of torch.save"
            raise ValueError(f"it is {what}: it has a record {quoted(name)}; {_AGAIN}")
    return folder, records


def _check_small(read_at: ReadAt, records: Mapping[str, Member]) -> None:
    """Raises ValueError for an order of bytes or a version that is not read, and for notes that are damaged."""
    for name in _NOTES & records.keys():
        _content(read_at, records, name, _SMALL_NBYTES)
    version = _content(read_at, records, "version", _SMALL_NBYTES).strip()
    if not version.isdigit() or int(version) not in _VERSIONS:
        raise ValueError(f"its version is {quoted(version.decode('latin-1'))}, known are {_VERSIONS[0]} to "
                         f"{_VERSIONS[-1]}")
    # Before torch 2.1 it was not written; machines with another order could not save for others.
    if "byteorder" in records and (order := _content(read_at, records, "byteorder", _SMALL_NBYTES)) != b"little":
        raise ValueError(f"its numbers are {quoted(order.decode('latin-1'))} endian, only little endian ones are read; "
                         f"load it with torch on this machine and save it again")


def _content(read_at: ReadAt, records: Mapping[str, Member], name: str, limit: int) -> bytes:
    """A record's bytes, of which there may be at most `limit`."""
    if name not in records:
        raise ValueError(f"it has no record {name}: it is no checkpoint of torch.save")
    member = records[name]
    if member.nbytes > limit:
        if name != "data.pkl" or limit == MAX_PICKLE_NBYTES:
            raise ValueError(f"its record {name} has {member.nbytes} bytes, the limit is {limit}")
        raise NoRoom(f"its record {name} has {member.nbytes} bytes, the limit is {limit}")
    content = read_at(member.begin, member.nbytes)
    if member.crc and zlib.crc32(content) != member.crc:
        raise ValueError(f"its record {name} is damaged: its CRC-32 is {zlib.crc32(content):08x}, and should be "
                         f"{member.crc:08x}; download or save it again")
    return content


def _places(records: Mapping[str, Member], storages: Mapping[str, StorageReference]
            ) -> dict[StorageReference, Member]:
    """The record of each storage; every record of data must be one's, and as long as it."""
    places = {}
    for key, storage in storages.items():
        member = records.get(f"data/{key}")
        if member is None:
            raise ValueError(f"the record data/{key}, which its values name, is missing")
        if member.nbytes != storage.nbytes:
            raise ValueError(f"its record data/{key} has {member.nbytes} bytes, a {storage.kind} of "
                             f"{storage.num_elements} elements needs {storage.nbytes}")
        places[storage] = member
    unused = [name for name in records if name.startswith("data/") and name[5:] not in storages]
    if unused:
        raise ValueError(f"its record {quoted(unused[0])} belongs to no tensor ({len(unused)} such records)")
    return places
