"""Every byte of a .pt file against the checksums in it, and against what torch.save writes around the records.

torch.load looks at no checksum. Between the records stand headers, descriptors and padding that torch reads past; where
a file has the records and the places that torch writes today, these bytes too are known.
"""
from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from stream_reshard.errors import SourceError, quoted
from stream_reshard.machine.stop import Stop
from stream_reshard.storage.crc32 import crc_of
from stream_reshard.storage.source_file import SourceFile
from stream_reshard.storage.torch_file import MAX_PICKLE_NBYTES
from stream_reshard.storage.torch_values import new_storage
from stream_reshard.storage.torch_writer import NewTorchFile, plan_records
from stream_reshard.storage.zip_file import ENTRY, Member, NoRoom, read_members

ID_NAME = ".data/serialization_id"
"""Record that depends on the names of the others."""

_ENTRY_CRC, _DESCRIPTOR_CRC = 16, 4
"""Offsets of the CRC-32 in an entry of the directory (4.3.12) and in a data descriptor (4.3.9), in bytes."""


def damage_in(root: Path, path: str, buffer: memoryview, stop: Stop) -> str | None:
    """The first fault of `root / path`, with its place; None for a file that is whole. Read through `buffer`. Raises
    SourceError for a file that is no zip of torch, ResourceError where it cannot be read."""
    with SourceFile(root, path) as file:
        members = _members(file, path)
        crcs: dict[str, int] = {}
        for name, member in members.items():
            crcs[name] = crc_of(file.pieces(member.begin, member.nbytes, buffer, stop))
            if member.crc and crcs[name] != member.crc:
                return (f"{quoted(path)}: its record {quoted(name)} is damaged: the CRC-32 of {member.nbytes} bytes at "
                        f"byte {member.begin} is {crcs[name]:08x}, and should be {member.crc:08x}")
        for begin, wanted in _frame(members, crcs, os.fstat(file.descriptor).st_size, file.read):
            if (found := file.read(begin, len(wanted))) != wanted:
                at = next(index for index, pair in enumerate(zip(found, wanted)) if pair[0] != pair[1])
                return (f"{quoted(path)}: between its records, byte {begin + at} is {found[at]:#04x}, where torch.save "
                        f"writes {wanted[at]:#04x}")
    return None


def sums_in(root: Path, path: str) -> frozenset[tuple[str, int, int]]:
    """(name below the folder, size, CRC-32) of the records of `root / path`, by its directory: what two files with the
    same values have in common. Raises SourceError."""
    with SourceFile(root, path) as file:
        members = _members(file, path)
    below = ((name.partition("/")[2], member) for name, member in members.items())
    return frozenset((name, member.nbytes, member.crc) for name, member in below if name != ID_NAME)


def _members(file: SourceFile, path: str) -> dict[str, Member]:
    try:
        return read_members(file.read, os.fstat(file.descriptor).st_size, MAX_PICKLE_NBYTES)
    except (ValueError, NoRoom) as error:
        raise SourceError(f"{quoted(path)}: {error}") from error


def _frame(members: Mapping[str, Member], crcs: Mapping[str, int], size: int,
           read_at: Callable[[int, int], bytes]) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes) of all that torch.save writes around the data of the storages. Nothing for a file of an older
    torch, with other records or other places; nor where checksums were left out."""
    folder = next(iter(members), "").partition("/")[0]
    pickled = members.get(f"{folder}/data.pkl")
    if pickled is None or not all(member.crc or not member.nbytes for member in members.values()):
        return
    storages = [new_storage("U8", member.nbytes) for name, member in members.items()
                if name.startswith(f"{folder}/data/")]
    if pickled.nbytes > MAX_PICKLE_NBYTES:
        return
    new = plan_records(read_at(pickled.begin, pickled.nbytes), storages, folder)
    if new.nbytes != size or [(record.name, record.begin, record.nbytes) for record in new.records] != [
            (name, member.begin, member.nbytes) for name, member in members.items()]:
        return
    data = [crcs[record.name] for record in new.storages]
    yield from (new.seam(index, data[index - 1] if index else 0) for index in range(len(data)))
    begin, end = new.end(data)
    number = read_at(new.after[1].begin, new.after[1].nbytes)
    yield begin, _with_id(new, begin, bytearray(end), number)


def _with_id(new: NewTorchFile, begin: int, end: bytearray, number: bytes) -> bytes:
    """The end of a file, from byte `begin` on, with its own serialization_id, which is another in each build."""
    record, crc = new.after[1], struct.pack("<I", zlib.crc32(number))
    after = record.begin + record.nbytes
    entry = end.rindex(record.name.encode()) - ENTRY.size
    for place, content in ((record.begin - begin, number), (after - begin + _DESCRIPTOR_CRC, crc),
                           (entry + _ENTRY_CRC, crc)):
        end[place:place + len(content)] = content
    return bytes(end)
