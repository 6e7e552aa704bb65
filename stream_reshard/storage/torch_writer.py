"""Writing .pt files byte for byte as torch.save does, without torch and in bounded memory.

The values are pickled first; then every offset is known, and the storages' bytes can be written in pieces, in any
order, by several workers. Between them stand short stretches with the CRC-32 of what came before, known once that is
written; the directory with all of them ends the file. The records and their order: torch/serialization.py, _save; their
headers: caffe2/serialize/inline_container.cc, getPadding, and third_party/miniz, mz_zip_writer_add_mem_ex_v2. Nothing
differs from torch's bytes but `.data/serialization_id`, which mixes hash values of one build of it and is read by
nobody.
"""
from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from stream_reshard.storage.pickle_writer import write_pickle
from stream_reshard.storage.torch_values import StorageReference
from stream_reshard.storage.zip_file import (DESCRIPTOR_FLAG, END, END64, END64_SIGN, END_SIGN, ENTRY, ENTRY_SIGN,
                                             IN_ZIP64, IN_ZIP64_COUNT, LOCAL, LOCAL_SIGN, LOCATOR, LOCATOR_SIGN,
                                             UTF8_FLAG)

ALIGNMENT = 64
"""Data begin at multiples of it, in bytes (torch.utils.serialization.config.save.storage_alignment)."""

_DESCRIPTOR_SIGN = 0x08074B50
_VERSION_MADE, _VERSION_NEEDED = 0x031E, 45
"""Of the zip64 end record: miniz writes Unix, 3.0, and 4.5."""

_ID_NBYTES = 40


@dataclass(frozen=True, slots=True)
class NewRecord:
    """A record of a file to be written."""

    name: str
    """With the folder."""
    header: int
    """Offset of its local header, in bytes."""
    begin: int
    """Offset of its first byte of data, in bytes."""
    nbytes: int
    """Length of its data, in bytes."""
    storage: StorageReference | None
    """The storage whose bytes it holds; None for a small one."""

    @property
    def is_wide(self) -> bool:
        """It needs a zip64 field: its size or its offset does not fit in 32 bits."""
        return self.nbytes >= IN_ZIP64 or self.header >= IN_ZIP64

    @property
    def end(self) -> int:
        """Offset past its data and their descriptor, which an empty record has not."""
        return self.begin + self.nbytes + (0 if not self.nbytes else 24 if self.is_wide else 16)


@dataclass(frozen=True)
class NewTorchFile:
    """A .pt file to be written. Its storages' bytes are the writer's business; all others come from here."""

    storages: tuple[NewRecord, ...]
    """Records of the storages, in the order of their bytes."""
    before: tuple[tuple[NewRecord, bytes], ...]
    """Small records before them, with their contents."""
    after: tuple[NewRecord, NewRecord]
    """Version and serialization_id, behind them."""

    @property
    def records(self) -> tuple[NewRecord, ...]:
        """All records in the order of their bytes."""
        return (*(record for record, _ in self.before), *self.storages, *self.after)

    @property
    def nbytes(self) -> int:
        """Size of the whole file, in bytes."""
        return self.after[-1].end + len(_directory([(record, 0) for record in self.records]))

    def seam(self, index: int, crc: int) -> tuple[int, bytes]:
        """(offset, bytes) of what ends where the storage `index` begins, from the one before it on, whose CRC-32 is
        `crc` (0 where there is none)."""
        if index:
            begin, parts = _tail(self.storages[index - 1], crc)
        else:
            begin, parts = 0, [_whole(record, content) for record, content in self.before]
        return begin, b"".join([*parts, _header(self.storages[index])])

    def end(self, crcs: Sequence[int]) -> tuple[int, bytes]:
        """(offset, bytes) of what follows the last storage, up to the file's end, by the CRC-32 of every storage."""
        assert len(crcs) == len(self.storages), f"{len(crcs)} CRCs are given for {len(self.storages)} storages"
        if self.storages:
            begin, parts = _tail(self.storages[-1], crcs[-1])
        else:
            begin, parts = 0, [_whole(record, content) for record, content in self.before]
        contents = _VERSION, serialization_id(self.records, crcs)
        small = [(record, zlib.crc32(content)) for record, content in self.before]
        late = [(record, zlib.crc32(content)) for record, content in zip(self.after, contents)]
        parts += [_whole(record, content) for record, content in zip(self.after, contents)]
        parts.append(_directory([*small, *zip(self.storages, crcs), *late]))
        return begin, b"".join(parts)


_VERSION = b"3\n"
"""Of the container; that of files without programs (caffe2/serialize/versions.h, kProducedFileFormatVersion)."""


def plan_torch_file(contents: Any, folder: str) -> NewTorchFile:
    """The file that holds these values, its records below `folder`: see `folder_of`. Raises TypeError for what is no
    value of a state."""
    return plan_records(*write_pickle(contents), folder)


def plan_records(pickled: bytes, storages: Sequence[StorageReference], folder: str) -> NewTorchFile:
    """The file that holds a pickle and the storages that it names, in its order."""
    small = [("data.pkl", pickled), (".format_version", b"1"), (".storage_alignment", b"%d" % ALIGNMENT),
             ("byteorder", b"little")]
    rows: list[tuple[str, int, StorageReference | None]] = [(name, len(content), None) for name, content in small]
    rows += [(f"data/{number}", storage.nbytes, storage) for number, storage in enumerate(storages)]
    rows += [("version", len(_VERSION), None), (".data/serialization_id", _ID_NBYTES, None)]
    records: list[NewRecord] = []
    for name, nbytes, storage in rows:
        records.append(_placed(f"{folder}/{name}", records[-1].end if records else 0, nbytes, storage))
    before = tuple((record, content) for record, (_, content) in zip(records, small))
    return NewTorchFile(tuple(records[len(small):-2]), before, (records[-2], records[-1]))


def folder_of(path: str) -> str:
    """The folder that torch gives a file's records: the file's name without its last suffix, or "archive" where the
    path is not ASCII (inline_container.cc, basename; torch/serialization.py, _open_zipfile_writer_file)."""
    name = path.rpartition("/")[2].rpartition("\\")[2]
    return (name.rpartition(".")[0] if "." in name else name) if path.isascii() else "archive"


def stream(file: NewTorchFile, pieces_of: Callable[[StorageReference], Iterable[bytes | memoryview]]
           ) -> Iterator[bytes | memoryview]:
    """The bytes of a whole file in their order, those of each storage as `pieces_of` gives them."""
    crcs: list[int] = []
    for index, record in enumerate(file.storages):
        assert record.storage is not None
        yield file.seam(index, crcs[-1] if crcs else 0)[1]
        crc = nbytes = 0
        for piece in pieces_of(record.storage):
            crc, nbytes = zlib.crc32(piece, crc), nbytes + len(piece)
            yield piece
        assert nbytes == record.nbytes, f"{record.name}: {nbytes} bytes came, {record.nbytes} were planned"
        crcs.append(crc)
    yield file.end(crcs)[1]


def serialization_id(records: Sequence[NewRecord], crcs: Sequence[int]) -> bytes:
    """40 digits by the names and the contents of the records, as torch has; not the same ones."""
    text = "\n".join([*(record.name for record in records), *map(str, crcs)])
    return b"%040d" % (int.from_bytes(hashlib.sha256(text.encode()).digest(), "big") % 10**_ID_NBYTES)


def _placed(name: str, header: int, nbytes: int, storage: StorageReference | None) -> NewRecord:
    """A record whose header begins at byte `header`, its data at the next multiple of the alignment."""
    bare = NewRecord(name, header, 0, nbytes, storage)
    begin = header + LOCAL.size + len(name.encode()) + len(_local_field(bare)) + 4
    return NewRecord(name, header, begin + -begin % ALIGNMENT, nbytes, storage)


def _local_field(record: NewRecord) -> bytes:
    """The zip64 field of a local header: the size and nothing for the packed one, and, against 4.5.3, the offset
    (miniz, mz_zip_writer_create_zip64_extra_data)."""
    values = ((record.nbytes, 0) if record.nbytes >= IN_ZIP64 else ()) + (
        (record.header,) if record.header >= IN_ZIP64 else ())
    return struct.pack(f"<HH{len(values)}Q", 1, 8 * len(values), *values) if values else b""


def _flags(record: NewRecord) -> int:
    return UTF8_FLAG | (DESCRIPTOR_FLAG if record.nbytes else 0)


def _header(record: NewRecord) -> bytes:
    """The local header, filled up with an extra field until the data begin; its numbers come behind them."""
    name, field = record.name.encode(), _local_field(record)
    padding = record.begin - record.header - LOCAL.size - len(name) - len(field) - 4
    extra = field + struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    return LOCAL.pack(LOCAL_SIGN, 0, _flags(record), 0, 0, 0, 0, 0, 0, len(name), len(extra)) + name + extra


def _tail(record: NewRecord, crc: int) -> tuple[int, list[bytes]]:
    """(offset, bytes) of a record's data descriptor (4.3.9)."""
    sizes = "<IIQQ" if record.is_wide else "<IIII"
    content = [struct.pack(sizes, _DESCRIPTOR_SIGN, crc, record.nbytes, record.nbytes)] if record.nbytes else []
    return record.begin + record.nbytes, content


def _whole(record: NewRecord, content: bytes) -> bytes:
    """A small record with all that belongs to it."""
    return b"".join([_header(record), content, *_tail(record, zlib.crc32(content))[1]])


def _directory(rows: Sequence[tuple[NewRecord, int]]) -> bytes:
    """The central directory and the records at the end, by the CRC-32 of each record; of zip64 in every file."""
    entries = b"".join(_entry(record, crc) for record, crc in rows)
    count, length, begin = len(rows), len(entries), rows[-1][0].end
    return b"".join([
        entries,
        END64.pack(END64_SIGN, END64.size - 12, _VERSION_MADE, _VERSION_NEEDED, 0, 0, count, count, length, begin),
        LOCATOR.pack(LOCATOR_SIGN, 0, begin + length, 1),
        END.pack(END_SIGN, 0, 0, *[min(count, IN_ZIP64_COUNT)] * 2, min(length, IN_ZIP64), min(begin, IN_ZIP64), 0)])


def _entry(record: NewRecord, crc: int) -> bytes:
    name = record.name.encode()
    wide = ((record.nbytes, record.nbytes) if record.nbytes >= IN_ZIP64 else ()) + (
        (record.header,) if record.header >= IN_ZIP64 else ())
    extra = struct.pack(f"<HH{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
    size, header = min(record.nbytes, IN_ZIP64), min(record.header, IN_ZIP64)
    return ENTRY.pack(ENTRY_SIGN, 0, 0, _flags(record), 0, 0, 0, crc, size, size, len(name), len(extra), 0, 0, 0, 0,
                      header) + name + extra
