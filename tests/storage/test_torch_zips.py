"""Zip files that only look like torch's: refused by what is wrong with them."""
import io
import struct
import zipfile
import zlib

import pytest
import torch
from torch_files import read, saved
from watching import watched

from stream_reshard.errors import ResourceError, SourceError
from stream_reshard.storage.zip_file import ENTRY, LOCAL


def test_records_beyond_all_numbers(tmp_path):
    """Two that are as long as a file can say, one behind the other."""
    path = saved([torch.ones(3)], tmp_path)
    made = Zip(path.read_bytes())
    del made.records[2:]
    size = 2**64 - 60
    spoiled(0, size=2**32 - 1, packed=2**32 - 1)(made)
    spoiled(0, 3, size=2**32 - 1, packed=2**32 - 1)(made)
    spoiled(1, offset=2**32 - 1)(made)
    set_part(0, 4, wide(struct.pack("<QQ", size, size)))(made)
    set_part(1, 4, wide(struct.pack("<Q", size + 44)))(made)
    path.write_bytes(bytes(made))
    with pytest.raises(SourceError, match="overlaps what begins at"):
        read(path)


@pytest.mark.parametrize("content, words", [(b"PK\3\4", "too few for a zip file"), (b"PK\3\4" + bytes(21), "cut off"),
                                            (b"PK\5\6" + bytes(18), "an empty zip file")])
def test_short_files_are_refused(content, words, tmp_path):
    (tmp_path / "state.pt").write_bytes(content)
    with pytest.raises(SourceError, match=words):
        read(tmp_path / "state.pt")


class Zip:
    """A zip by parts, each of which can be made wrong."""

    def __init__(self, content):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            self.records = [[info.filename.encode(), archive.read(info), {}, {}, b"", b""] for info in archive.infolist()]
        self.end, self.tail, self.front, self.shift = {}, b"", b"", {}

    def __bytes__(self):
        out, directory = bytearray(self.front), b""
        for i, (name, data, central, local, extra, gap) in enumerate(self.records):
            at = self.shift.get(i, len(out))
            crc = zlib.crc32(data)
            row = {"sign": 0x04034B50, "flags": 0, "method": 0, "crc": crc, "packed": len(data), "size": len(data),
                   "name": name} | local
            out += LOCAL.pack(row["sign"], 0, row["flags"], row["method"], 0, 0, row["crc"], row["packed"], row["size"],
                              len(row["name"]), 0) + row["name"] + data + gap
            row = {"sign": 0x02014B50, "flags": 0, "method": 0, "crc": crc, "packed": len(data), "size": len(data),
                   "name": name, "comment": b"", "disk": 0, "attributes": 0, "offset": at} | central
            directory += ENTRY.pack(row["sign"], 0, 0, row["flags"], row["method"], 0, 0, row["crc"], row["packed"],
                                    row["size"], len(row["name"]), len(extra), len(row["comment"]), row["disk"], 0,
                                    row["attributes"], row["offset"]) + row["name"] + extra + row["comment"]
        row = {"disk": 0, "here": len(self.records), "total": len(self.records), "size": len(directory), "at": len(out),
               "comment": b""} | self.end
        return bytes(out) + directory + self.tail + struct.pack(
            "<IHHHHIIH", 0x06054B50, row["disk"], 0, row["here"], row["total"], row["size"], row["at"], len(row["comment"])
        ) + row["comment"]


def spoiled(index=None, place=2, **fields):
    """Changes a field of a record, in the directory (2) or in its own header (3); or of the end record."""
    return lambda made: (made.end if index is None else made.records[index][place]).update(fields)


def set_part(index, part, value):
    return lambda made: made.records[index].__setitem__(part, value)


def also(*changes):
    return lambda made: [change(made) for change in changes]


def wide(content, size=None):
    return struct.pack("<HH", 1, len(content) if size is None else size) + content


def zip64(at=None, disks=1, size=44, count=None):
    """A zip64 end record and its locator, for a file that knows where they stand."""
    def change(made):
        bare = bytes(made)
        begin, length, total = (*struct.unpack_from("<II", bare, len(bare) - 10)[::-1], len(made.records))
        total = total if count is None else count
        made.tail = struct.pack("<IQHHIIQQQQ", 0x06064B50, size, 45, 45, 0, 0, total, total, length, begin) + struct.pack(
            "<IIQI", 0x07064B50, 0, len(bare) - 22 if at is None else at, disks)
    return change


ZIPS = {
    "compressed": (spoiled(0, method=8), "is compressed (method 8)"), "lzma": (spoiled(1, method=14), "method 14"),
    "compressed, by its header": (spoiled(0, 3, method=8), "disagrees with the directory"),
    "encrypted": (spoiled(0, flags=1), "is encrypted"), "strongly encrypted": (spoiled(1, flags=0x41), "is encrypted"),
    "masked": (spoiled(1, flags=0x2000), "is encrypted"), "encrypted, by its header": (spoiled(0, 3, flags=1), "disagrees"),
    "patched": (spoiled(0, flags=0x20), "flags 0x0020"), "comment": (spoiled(0, comment=b"x"), "a comment of 1 bytes"),
    "folder with data": (spoiled(0, attributes=0x10), "attributes of a folder"), "other disk": (spoiled(1, disk=1), "disk 1"), "duplicate": (also(set_part(1, 0, b"state/data.pkl")), "two of its records"),
    "same place twice": (lambda made: made.shift.update({1: 0}), "overlap"),
    "inside another": (lambda made: made.shift.update({1: 40}), "overlap"),
    "longer": (spoiled(0, size=10**6, packed=10**6), "disagrees"),
    "longer, in both": (also(spoiled(0, size=10**6, packed=10**6), spoiled(0, 3, size=10**6, packed=10**6)), "overlaps"),
    "packed": (spoiled(0, packed=3), "claims to take 3"), "crc": (spoiled(0, crc=7), "disagrees"),
    "other name": (spoiled(0, 3, name=b"state/data.pkm"), "disagrees"), "sign": (spoiled(0, 3, sign=1), "no zip file"),
    "sign of the second": (spoiled(1, 3, sign=1), "disagrees"), "entry's sign": (spoiled(0, sign=1), "the entry at byte"),
    "offset beyond": (spoiled(1, offset=2**31), "belong to no record"), "offset beyond all": (
        spoiled(6, offset=2**32 - 2), "belong to no record"),
    "gap": (set_part(0, 5, bytes(25)), "25 bytes that belong to no record"), "hidden program": (
        set_part(0, 5, b"MZ" + bytes(1000)), "belong to no record"),
    "in front": (lambda made: setattr(made, "front", b"#!/bin/sh\n"), "no zip file"),
    "zip in front": (lambda made: setattr(made, "front", b"PK\3\4" + bytes(60)), "64 bytes stand before its first record"),
    "absolute name": (also(spoiled(3, name=b"/etc/passwd"), spoiled(3, 3, name=b"/etc/passwd")), "the strange name '/etc"),
    "name that leads up": (spoiled(3, name=b"state/../../x"), "strange name"), "folder": (spoiled(3, name=b"state/"), "strange"),
    "name with a backslash": (spoiled(3, name=b"state\\x"), "strange"), "empty name": (spoiled(3, name=b""), "has 0 bytes"),
    "name of control characters": (spoiled(3, name=b"state/\x1b[2J"), "strange"), "name not UTF-8": (
        spoiled(3, name=b"state/\xff"), "not UTF-8"), "long name": (spoiled(3, name=b"s" * 2000), "2000 bytes"),
    "two folders": (also(set_part(3, 0, b"other/byteorder")), "are not in one folder"),
    "no folder": (also(set_part(3, 0, b"byteorder")), "are not in one folder"),
    "no pickle": (lambda made: made.records.pop(0), "no record data.pkl"), "no version": (
        lambda made: made.records.pop(-2), "no record version"),
    "data of nobody": (lambda made: made.records.append([b"state/data/9", b"x", {}, {}, b"", b""]), "belongs to no tensor"),
    "data in a folder": (lambda made: made.records.append([b"state/data/0/1", b"", {}, {}, b"", b""]), "belongs to no tensor"),
    "data missing": (lambda made: made.records.pop(4), "the record data/0, which its values name, is missing"),
    "zip64 field missing": (spoiled(0, size=2**32 - 1), "a zip64 field of 0 bytes, where 8"),
    "zip64 field too much": (set_part(0, 4, wide(bytes(8))), "a zip64 field of 8 bytes, where 0"),
    "two zip64 fields": (also(set_part(0, 4, wide(bytes(8)) * 2), spoiled(0, size=2**32 - 1)), "two zip64 fields"),
    "field cut off": (set_part(0, 4, wide(b"1234", 9)), "is cut off"), "field of two bytes": (set_part(0, 4, b"12"), "cut off"),
    "endless": (also(set_part(0, 4, wide(b"\xff" * 16)), spoiled(0, size=2**32 - 1, packed=2**32 - 1)), "disagrees"),
    "endless offset": (also(set_part(1, 4, wide(b"\xff" * 8)), spoiled(1, offset=2**32 - 1)), "belong to no record"),
    "several parts": (spoiled(disk=1), "one of several parts"), "fewer here": (spoiled(here=1), "one of several parts"),
    "comment at the end": (spoiled(comment=b"x" * 30), "cut off, or something was added"),
    "more records": (spoiled(here=8000, total=8000), "claims 8000 records"),
    "one record more": (spoiled(here=8, total=8), "ends within"), "one record fewer": (spoiled(here=6, total=6), "follow the last"),
    "directory elsewhere": (spoiled(at=0), "its directory ends at"), "directory beyond": (spoiled(at=2**32 - 2), "ends at"),
    "directory longer": (spoiled(size=10**9), "its directory ends at"), "directory of nothing": (
        spoiled(size=0, here=0, total=0), "its directory ends at"),
    "zip64 records elsewhere": (zip64(at=0), "zip64 locator points to"), "two disks": (zip64(disks=2), "zip64 locator"),
    "no disk": (zip64(disks=0), "zip64 locator"), "disk in zip64": (also(zip64(), spoiled(disk=65535)), "one of several parts"),
    "zip64 records longer": (zip64(size=99), "zip64 end record is not valid"),
    "end records disagree": (zip64(count=5), "its two end records disagree"),
    "endless count": (also(zip64(count=2**60), spoiled(here=65535, total=65535)), "the limit is 1048576"),
    "appended": (lambda made: made.end.update(comment=b""), None), "with zip64": (zip64(), None)}


@pytest.mark.parametrize("case", ZIPS)
def test_zips_are_refused_by_what_is_wrong(case, tmp_path):
    path = saved([torch.ones(3)], tmp_path)
    made = Zip(path.read_bytes())
    change, words = ZIPS[case]
    change(made)
    path.write_bytes(bytes(made))
    if words is None:
        assert read(path).contents[0].shape == (3,)
        return
    with pytest.raises(SourceError) as error, watched() as peak:
        read(path)
    said = str(error.value)
    assert words in said and "state.pt" in said and said.isprintable() and len(said) < 600 and peak[0] < 2**19


def test_a_large_directory_needs_memory(tmp_path):
    """Its size is looked at before it is read, and of a pickle too."""
    path = saved([torch.ones(1) for _ in range(2000)], tmp_path)
    with pytest.raises(ResourceError, match="--max-memory"), watched() as peak:
        read(path, max_nbytes=10_000)
    assert peak[0] < 2**18
