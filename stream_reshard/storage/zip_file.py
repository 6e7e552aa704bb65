"""The container of a .pt file: a zip of stored members, read by byte ranges and never extracted.

Everything is checked before it is believed, against PKWARE's APPNOTE (https://www.pkware.com/documents/casestudies/
APPNOTE.TXT) and against what torch writes (caffe2/serialize/inline_container.cc): members that are stored, whole, not
encrypted, one behind the other from the first byte on, with nothing between them and nothing hidden.
"""
from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from stream_reshard.errors import quoted

MAX_MEMBERS = 1 << 20
"""Members of an archive: a model has some 100,000 tensors at the most."""

END = struct.Struct("<IHHHHIIH")
"""End of central directory record (4.3.16): signature, two disk numbers, two counts, size, offset, comment length."""
END64 = struct.Struct("<IQHHIIQQQQ")
"""Zip64 end of central directory record (4.3.14): signature, size, two versions, two disk numbers, two counts, size,
offset."""
LOCATOR = struct.Struct("<IIQI")
"""Zip64 end of central directory locator (4.3.15): signature, disk, offset of that record, number of disks."""
ENTRY = struct.Struct("<IHHHHHHIIIHHHHHII")
"""Central directory header (4.3.12): signature, two versions, flags, method, time, date, crc, two sizes, lengths of
name, extra field and comment, disk, two attributes, offset."""
LOCAL = struct.Struct("<IHHHHHIIIHH")
"""Local file header (4.3.7): signature, version, flags, method, time, date, crc, two sizes, lengths of name and extra
field."""

END_SIGN, END64_SIGN, LOCATOR_SIGN, ENTRY_SIGN, LOCAL_SIGN = 0x06054B50, 0x06064B50, 0x07064B50, 0x02014B50, 0x04034B50

IN_ZIP64 = 0xFFFFFFFF
"""Value of a field of 32 bits whose true value stands in a zip64 field (4.3.9.2)."""
IN_ZIP64_COUNT = 0xFFFF

DESCRIPTOR_FLAG, UTF8_FLAG = 0x0008, 0x0800
"""Sizes and crc stand behind the data; the name is UTF-8 (4.4.4)."""

_ENCRYPTED = 0x2041

_FOLDER_ATTRIBUTE = 0x10
"""That of DOS (4.4.15): miniz, and so torch, takes a record with it for a folder, without bytes."""

_MAX_NAME_NBYTES = 1024
_MAX_GAP_NBYTES = 24
"""A data descriptor, the only thing between two members, has 12 to 24 bytes (4.3.9)."""

ReadAt = Callable[[int, int], bytes]
"""(offset, nbytes) -> exactly so many bytes of the file. Raises ValueError where there are fewer."""


class NoRoom(Exception):
    """That a directory or a record is too long for the memory there is, in words."""


class NoEnd(ValueError):
    """A file that does not end as a zip file does, in words."""


@dataclass(frozen=True, slots=True)
class Member:
    """A member of a zip file."""

    begin: int
    """Offset of its first byte of data in the file, in bytes."""
    nbytes: int
    """Length of its data, in bytes."""
    crc: int
    """CRC-32 of its data as the directory gives it; 0 where torch was told not to compute it (set_crc32_options)."""


@dataclass(frozen=True)
class _Directory:
    """Place of the central directory."""

    begin: int
    nbytes: int
    num_members: int


@dataclass(frozen=True, slots=True)
class _Entry:
    """A member as the central directory describes it."""

    name: str
    flags: int
    crc: int
    nbytes: int
    header: int
    """Offset of its local header, in bytes."""


def read_members(read_at: ReadAt, size: int, max_nbytes: int) -> dict[str, Member]:
    """The members of a zip file of `size` bytes by their names, in the directory's order.

    Raises ValueError, in words, for anything that torch does not write or that would let two readers find different
    things; NoRoom where the directory has more than `max_nbytes`.
    """
    directory = _directory(read_at, size)
    if directory.num_members > MAX_MEMBERS:
        raise ValueError(f"its directory claims {directory.num_members} records, the limit is {MAX_MEMBERS}")
    if directory.num_members * ENTRY.size > directory.nbytes:
        raise ValueError(f"its directory of {directory.nbytes} bytes claims {directory.num_members} records")
    if directory.nbytes > max_nbytes:
        raise NoRoom(f"its directory has {directory.nbytes} bytes, the limit is {max_nbytes}")
    entries = list(_entries(read_at(directory.begin, directory.nbytes), directory))
    return _placed(read_at, entries, directory.begin)


def _directory(read_at: ReadAt, size: int) -> _Directory:
    """Place of the directory, by the records at the file's end. No comment may follow them: what looks like an end
    record in a comment is one for some readers."""
    at = size - END.size
    if at < 0:
        raise NoEnd(f"{size} bytes are too few for a zip file")
    sign, disk, first_disk, here, total, nbytes, begin, comment = END.unpack(read_at(at, END.size))
    if sign != END_SIGN:
        raise NoEnd("it does not end with the end record of a zip file: it is cut off, or something was added")
    if comment or here != total or disk or first_disk:
        raise ValueError("it is one of several parts of a zip file, or its end record has a comment")
    found = _Directory(begin, nbytes, total)
    if at >= LOCATOR.size + END64.size:
        wide = _wide_directory(read_at, at - LOCATOR.size)
        if wide:
            at -= LOCATOR.size + END64.size
            found = _merged(found, wide)
    if (end := found.begin + found.nbytes) != at:
        raise ValueError(f"its directory ends at byte {end}, the records at its end begin at {at}")
    return found


def _wide_directory(read_at: ReadAt, at: int) -> _Directory | None:
    """The same by the zip64 records, whose locator stands at byte `at` where there is one."""
    sign, disk, place, num_disks = LOCATOR.unpack(read_at(at, LOCATOR.size))
    if sign != LOCATOR_SIGN:
        return None
    if disk or num_disks != 1 or place != at - END64.size:
        raise ValueError(f"its zip64 locator points to byte {place} of disk {disk}, and belongs to {at - END64.size}")
    sign, nbytes, _, _, disk, first_disk, here, total, length, begin = END64.unpack(read_at(place, END64.size))
    if sign != END64_SIGN or nbytes != END64.size - 12 or disk or first_disk or here != total:
        raise ValueError("its zip64 end record is not valid")
    return _Directory(begin, length, total)


def _merged(narrow: _Directory, wide: _Directory) -> _Directory:
    """The wide values, where the narrow ones are the same or say that they do not fit."""
    for value, limit, true in ((narrow.begin, IN_ZIP64, wide.begin), (narrow.nbytes, IN_ZIP64, wide.nbytes),
                               (narrow.num_members, IN_ZIP64_COUNT, wide.num_members)):
        if value not in (limit, true):
            raise ValueError(f"its two end records disagree: {value} and {true}")
    return wide


def _entries(text: bytes, directory: _Directory) -> Iterator[_Entry]:
    at = 0
    for _ in range(directory.num_members):
        if at + ENTRY.size > len(text):
            raise ValueError(f"its directory ends within a record's entry, at byte {directory.begin + len(text)}")
        fields = ENTRY.unpack_from(text, at)
        lengths = fields[10:13]
        end = at + ENTRY.size + sum(lengths)
        if fields[0] != ENTRY_SIGN or end > len(text):
            raise ValueError(f"the entry at byte {directory.begin + at} of its directory is not valid")
        name_end = at + ENTRY.size + lengths[0]
        yield _entry(fields, text[at + ENTRY.size:name_end], text[name_end:name_end + lengths[1]])
        at = end
    if at != len(text):
        raise ValueError(f"{len(text) - at} bytes follow the last entry of its directory")


def _entry(fields: tuple[int, ...], raw_name: bytes, extra: bytes) -> _Entry:
    name = _name(raw_name)
    flags, method, crc, packed, nbytes = fields[3], fields[4], *fields[7:10]
    comment, disk, attributes, header = fields[12], fields[13], fields[15], fields[16]
    if flags & _ENCRYPTED:
        raise ValueError(f"its record {quoted(name)} is encrypted")
    if method:
        raise ValueError(f"its record {quoted(name)} is compressed (method {method}), where torch.save stores records "
                         f"as they are; load it with torch and save its state_dict")
    if flags & ~(DESCRIPTOR_FLAG | UTF8_FLAG) or comment or disk:
        raise ValueError(f"its record {quoted(name)} has flags {flags:#06x}, a comment of {comment} bytes and disk "
                         f"{disk}, which torch.save does not write")
    if attributes & _FOLDER_ATTRIBUTE:
        raise ValueError(f"its record {quoted(name)} has the attributes of a folder ({attributes:#010x})")
    nbytes, packed, header = _widened(name, (nbytes, packed, header), extra)
    if packed != nbytes:
        raise ValueError(f"its record {quoted(name)} of {nbytes} bytes claims to take {packed}")
    return _Entry(name, flags, crc, nbytes, header)


def _name(raw: bytes) -> str:
    try:
        name = raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"a record's name is not UTF-8: {quoted(raw.decode('latin-1'))}") from error
    if not 0 < len(raw) <= _MAX_NAME_NBYTES:
        raise ValueError(f"a record's name has {len(raw)} bytes, the limit is {_MAX_NAME_NBYTES}")
    if not name.isprintable() or "\\" in name or not {"", ".", ".."}.isdisjoint(name.split("/")):
        raise ValueError(f"a record has the strange name {quoted(name)}")
    return name


def _widened(name: str, values: tuple[int, ...], extra: bytes) -> tuple[int, ...]:
    """The values with those that do not fit in 32 bits taken from the zip64 field, which holds them and no other, in
    this order (4.5.3)."""
    wide = b""
    for kind, content in _fields(name, extra):
        if kind == 1:
            if wide:
                raise ValueError(f"its record {quoted(name)} has two zip64 fields")
            wide = content
    if len(wide) != 8 * values.count(IN_ZIP64):
        raise ValueError(f"its record {quoted(name)} has a zip64 field of {len(wide)} bytes, where "
                         f"{8 * values.count(IN_ZIP64)} are needed")
    numbers = (number for number, in struct.iter_unpack("<Q", wide))
    return tuple(next(numbers) if value == IN_ZIP64 else value for value in values)


def _fields(name: str, extra: bytes) -> Iterator[tuple[int, bytes]]:
    """(kind, content) of the extra fields of a record (4.5.1)."""
    at = 0
    while at < len(extra):
        kind, length = struct.unpack_from("<HH", extra, at) if at + 4 <= len(extra) else (0, len(extra))
        if at + 4 + length > len(extra):
            raise ValueError(f"an extra field of its record {quoted(name)} is cut off")
        yield kind, extra[at + 4:at + 4 + length]
        at += 4 + length


def _placed(read_at: ReadAt, entries: list[_Entry], end: int) -> dict[str, Member]:
    """The members, their places checked against each other and against `end`, where the directory begins."""
    found: dict[str, Member] = {}
    ordered = sorted(entries, key=lambda entry: entry.header)
    if ordered and ordered[0].header:
        raise ValueError(f"{ordered[0].header} bytes stand before its first record")
    for entry, limit in zip(ordered, [*(entry.header for entry in ordered[1:]), end]):
        begin = _data_begin(read_at, entry, limit)
        gap = limit - begin - entry.nbytes
        if gap < 0:
            raise ValueError(f"its record {quoted(entry.name)} of {entry.nbytes} bytes at {begin} overlaps what begins "
                             f"at {limit}")
        if gap > _MAX_GAP_NBYTES:
            raise ValueError(f"{gap} bytes that belong to no record follow {quoted(entry.name)}")
        if entry.name in found:
            raise ValueError(f"two of its records have the name {quoted(entry.name)}")
        found[entry.name] = Member(begin, entry.nbytes, entry.crc)
    return {entry.name: found[entry.name] for entry in entries}


def _data_begin(read_at: ReadAt, entry: _Entry, limit: int) -> int:
    """Offset of a record's data, by its local header, whose extra field may be longer than the directory's."""
    raw_name = entry.name.encode()
    length = LOCAL.size + len(raw_name)
    if entry.header + length > limit:
        raise ValueError(f"the header of its record {quoted(entry.name)} at {entry.header} overlaps what begins at "
                         f"{limit}")
    header = read_at(entry.header, length)
    numbers: tuple[int, ...] = LOCAL.unpack_from(header)
    sign, _, flags, method, _, _, crc, packed, nbytes, name_nbytes, extra_nbytes = numbers
    sizes = {packed, nbytes}
    is_same = (sign, flags, method, name_nbytes, header[LOCAL.size:]) == (
        LOCAL_SIGN, entry.flags, 0, len(raw_name), raw_name)
    # Where a descriptor follows, torch leaves the numbers 0 here; other writers give them.
    if flags & DESCRIPTOR_FLAG and not crc and sizes == {0}:
        sizes, crc = {entry.nbytes}, entry.crc
    if not is_same or crc != entry.crc or not sizes <= {entry.nbytes, IN_ZIP64}:
        raise ValueError(f"the header of its record {quoted(entry.name)} at {entry.header} disagrees with the "
                         f"directory")
    return entry.header + length + extra_nbytes
