"""Files that only look like torch's: refused in one line, without running or importing what they name, in little memory.
Whatever is accepted, torch reads as the same values."""
import io
import pickle
import pickletools
import random
import struct
import sys
import time
import tracemalloc
import zipfile
import zlib
from collections import OrderedDict
from contextlib import contextmanager

import pytest
import torch
from torch_files import assert_same, members_of, pieces, read, saved, with_pickle

from stream_reshard.errors import ResourceError, SourceError, StreamReshardError
from stream_reshard.storage.pickle_writer import write_pickle
from stream_reshard.storage.restricted_pickle import read_pickle
from stream_reshard.storage.zip_file import ENTRY, LOCAL

_WATCHED = {"import", "exec", "compile", "os.system", "os.exec", "os.fork", "subprocess.Popen", "pickle.find_class",
            "marshal.loads", "os.remove", "os.rename", "os.mkdir", "socket.__new__", "ctypes.dlopen"}
_EVENTS, _ARMED = [], []


def _hook(event, arguments):
    """Audit hooks stay for ever: this one listens while there is something in a list."""
    if _ARMED and event in _WATCHED:
        _EVENTS.append((event, str(arguments)[:200]))


sys.addaudithook(_hook)


@contextmanager
def watched(is_traced=True):
    """Lets nothing be imported, executed or removed meanwhile; gives a list in which the peak of memory stands then."""
    peak = []
    if is_traced:
        tracemalloc.start()
    _ARMED.append(1)
    try:
        yield peak
    finally:
        _ARMED.clear()
        peak.append(tracemalloc.get_traced_memory()[1] if is_traced else 0)
        tracemalloc.stop()
    assert not _EVENTS


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """Small files of torch of every kind, as (path, content)."""
    whole = torch.arange(12.0).view(3, 4)
    model = torch.nn.Linear(2, 2)
    values = [{"a": whole, "b": whole[1], "c": whole.t(), "names": {0: "x", 1: "y"}}, model.state_dict(),
              {"groups": [{"lr": 0.1, "betas": (0.9, 0.95), "params": [i]} for i in range(3)], "n": [2**40, -1, None, True]},
              [torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16)), torch.zeros(2).to(torch.float8_e5m2), torch.tensor(7)],
              OrderedDict(x=torch.ones(3, dtype=torch.int8), y=(torch.empty(0), 1, 2, 3, "\u00e9"))]
    folder = tmp_path_factory.mktemp("seeds")
    paths = [saved(value, folder, f"{i}.pt") for i, value in enumerate(values)]
    return [(path, path.read_bytes()) for path in paths]


def pickle_of(content):
    name = next(name for name in members_of(content) if name.endswith("/data.pkl"))
    return b"".join(pieces(content, members_of(content)[name]))


class Call:
    """What runs code where it is unpickled."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def opcodes(text):
    """The opcodes of a pickle, each with its argument."""
    at = [position for _, _, position in pickletools.genops(text)] + [len(text)]
    return [text[a:b] for a, b in zip(at, at[1:])]


P, TENSOR = b"\x80\x02", b"ctorch._utils\n_rebuild_tensor_v2\n"
STORAGE = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0%sX\3\0\0\0cpu%stQ"
ORDERED = b"ccollections\nOrderedDict\n)R"


def tensor(offset=b"K\0", shape=b"K\3\x85", strides=b"K\1\x85", grad=b"\x89", hooks=ORDERED, key=b"0", numel=b"K\3"):
    return TENSOR + b"(" + STORAGE % (key, numel) + offset + shape + strides + grad + hooks + b"tR"


PICKLES = {
    "system": (pickle.dumps(Call(__import__("os").system, "touch /tmp/owned"), 2), "'posix.system', which is no tensor"),
    "eval": (pickle.dumps(Call(eval, "1"), 2), "'__builtin__.eval', which is no tensor"),
    "getattr": (P + b"cbuiltins\ngetattr\n(K\1X\1\0\0\0xtR.", "'builtins.getattr'"),
    "dotted name": (P + b"ctorch\nserialization.os.system\n.", "'torch.serialization.os.system'"),
    "another name of torch": (P + b"ctorch._utils\n_rebuild_qtensor\n.", "'torch._utils._rebuild_qtensor'"),
    "name with escapes": (P + b"c\x1b[2J\n\xff\xfe\n.", "'\\x1b[2J."),
    "endless name": (P + b"c" + b"a" * 300 + b"\nb\n.", "a name of more than 200 bytes"),
    "instance": (P + b"(ios\nsystem\n.", "the opcode 0x69"), "object": (P + b"(cos\nsystem\no.", "'os.system'"),
    "new object": (P + ORDERED[:-2] + b")\x81.", "the opcode 0x81"), "by number": (P + b"\x82\1.", "the opcode 0x82"),
    "protocol 4": (pickle.dumps([1], 4), "where torch.save writes protocol 2"),
    "protocol 0": (pickle.dumps([1], 0), "where torch.save writes protocol 2"),
    "stack global": (P + b"X\2\0\0\0osX\6\0\0\0system\x93.", "the opcode 0x93"),
    "call of a text": (P + b"X\1\0\0\0x)R.", "calls 'x'"), "call of a list": (P + b"])R.", "calls a list"),
    "call of a storage class": (P + b"ctorch\nFloatStorage\n)R.", "calls 'torch.FloatStorage'"),
    "arguments in a list": (P + ORDERED[:-2] + b"]R.", "which is no function"),
    "name as a value": (P + b"]ctorch\nFloatStorage\na.", "the name torch.FloatStorage as a value"),
    "storage as a value": (P + STORAGE % (b"0", b"K\3") + b".", "a storage without a tensor"),
    "another persistent id": (P + b"X\1\0\0\0xQ.", "something else than a storage"),
    "persistent id of a module": (P + b"(X\6\0\0\0modulectorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpuK\1tQ.", "else than a"),
    "storage of a dtype": (P + (STORAGE % (b"0", b"K\3")).replace(b"FloatStorage", b"uint16") + b".", "has the class"),
    "key that leads away": (P + STORAGE.replace(b"X\1\0\0\0%s", b"X\4\0\0\0../0%s") % (b"", b"K\3") + b".", "no number"),
    "key in another script": (P + STORAGE.replace(b"X\1\0\0\0", b"X\2\0\0\0") % ("\u00b2".encode(), b"K\3") + b".", "no number"),
    "numel negative": (P + tensor(numel=b"J\xff\xff\xff\xff") + b".", "'-1' elements"),
    "numel endless": (P + tensor(numel=b"\x8a\7" + b"\0" * 6 + b"\1") + b".", "elements on"),
    "numel a bool": (P + tensor(numel=b"\x88") + b".", "'True' elements"),
    "storage described twice": (P + b"(" + tensor() + tensor(numel=b"K\4") + b"t.", "is described twice"),
    "no record": (P + tensor(key=b"7") + b".", "the record data/7, which its values name, is missing"),
    "longer than its record": (P + tensor(numel=b"K\4") + b".", "has 12 bytes, a FloatStorage of 4 elements needs 16"),
    "beyond its storage": (P + tensor(offset=b"K\1") + b".", "ends at element 4 of the storage 0, which has 3"),
    "shape beyond": (P + tensor(shape=b"K\4\x85") + b".", "ends at element 4"),
    "strides beyond": (P + tensor(strides=b"K\2\x85") + b".", "ends at element 5"),
    "empty, but beyond": (P + tensor(offset=b"K\4", shape=b"K\0\x85") + b".", "ends at element 4"),
    "expanded without end": (P + tensor(shape=b"J\0\0\0\x40" * 2 + b"\x86", strides=b"K\0K\0\x86") + b".", "the limit is"),
    "negative strides": (P + tensor(strides=b"J\xff\xff\xff\xff\x85") + b".", "not plain sizes"),
    "negative offset": (P + tensor(offset=b"J\xff\xff\xff\xff") + b".", "not plain sizes"),
    "offset of 9 bytes": (P + tensor(offset=b"\x8a\x09" + b"\xff" * 8 + b"\0") + b".", "not plain sizes"),
    "shape in a list": (P + tensor(shape=b"]K\3a") + b".", "not plain sizes"),
    "nine dims": (P + tensor(shape=b"(" + b"K\1" * 9 + b"t", strides=b"(" + b"K\1" * 9 + b"t") + b".", "more than 8 dims"),
    "more dims than strides": (P + tensor(shape=b"K\1K\3\x86") + b".", "not plain sizes"),
    "tensor of a number": (P + TENSOR + b"(K\1K\0))\x89" + ORDERED + b"tR.", "no storage with a dtype"),
    "tensor of bytes": (P + tensor().replace(b"torch\nFloat", b"torch.storage\nUntyped") + b".", "no storage with a dtype"),
    "no dtype": (P + tensor(hooks=ORDERED + b"K\1").replace(b"_v2", b"_v3") + b".", "no dtype that is known"),
    "dtype that is a class": (P + tensor(hooks=ORDERED + b"ctorch\nFloatStorage\n").replace(b"_v2", b"_v3") + b".", "no dtype that"),
    "dtype of another storage": (P + tensor(hooks=ORDERED + b"ctorch\nuint16\n").replace(b"_v2", b"_v3") + b".", "no storage of bytes"),
    "dict of something": (P + ORDERED[:-2] + b"]\x85R.", "an OrderedDict is made of something"),
    "hooks of a parameter": (P + b"ctorch._utils\n_rebuild_parameter\n" + tensor() + b"\x88}\x87R.", "a parameter has hooks"),
    "device": (P + tensor().replace(b"cpu", b"CPU") + b".", "elements on 'CPU'"),
    "number past the end": (P + b"J\0", "cut off, or takes"), "float past the end": (P + b"G1234", "cut off, or takes"),
    "tuple of too few": (P + b"N\x86.", "cut off, or takes"), "name past the end": (P + b"cos", "a name of more than"),
    "hooks": (P + tensor(hooks=b"}") + b".", "has hooks"),
    "hooks that are filled": (P + tensor(hooks=ORDERED + b"K\1K\1s") + b".", "has hooks"),
    "bits of a view": (P + tensor(hooks=ORDERED + b"}X\4\0\0\0conj\x88s") + b".", "conjugate"),
    "tensor of nothing": (P + TENSOR + b")R.", "more than a storage"),
    "parameter of a number": (P + b"ctorch._utils\n_rebuild_parameter\nK\1\x88" + ORDERED + b"\x87R.", "else than a tensor"),
    "state of a list": (P + b"]}X\x09\0\0\0_metadataK\1sb.", "gives a list attributes"),
    "attributes": (P + ORDERED + b"}X\x09\0\0\0__class__K\1sb.", "attributes"),
    "item of a tuple": (P + b")K\1K\1s.", "sets an item of a tuple"), "item of a text": (P + b"X\0\0\0\0K\1K\1s.", "sets an item"),
    "append to a dict": (P + b"}K\1a.", "appends to a dict"), "append to a tuple": (P + b"((K\1e.", "cut off, or takes"),
    "key that is a list": (P + b"}]K\1s.", "a list as a key"), "key that is a tuple": (P + b"})K\1s.", "a tuple as a key"),
    "key that is a float": (P + b"}G" + bytes(8) + b"K\1s.", "a float as a key"), "key twice": (P + b"}(K\1NK\1Nu.", "occurs twice"),
    "odd items": (P + b"}(K\1u.", "sets an item"), "no mark": (P + b"}t.", "cut off, or takes a value"),
    "empty stack": (P + b".", "with 0 values"), "two values": (P + b"NN.", "with 2 values"), "open mark": (P + b"N(N.", "ends at"),
    "after the end": (P + b"N.N", "ends at byte 4 of 5"), "no end": (P + b"]", "cut off"), "nothing": (b"", "begins with"),
    "unknown memo": (P + b"h\5.", "refers to the value 5"), "memo of nothing": (P + b"q\0.", "cut off, or takes"),
    "surrogates": (P + b"X\3\0\0\0\xed\xa0\x80.", "not UTF-8"), "text past the end": (P + b"X\xff\0\0\0a.", "cut off"),
    "long text": (P + b"X\1\0\1\0" + b"a" * 65537 + b".", "a text of 65537 bytes"),
    "long integer": (P + b"\x8a\xff" + b"\xff" * 255 + b".", "an integer of 255 bytes"),
    "longer integer": (P + b"\x8b\0\0\0\x40", "the opcode 0x8b"), "decimal": (P + b"I1\n.", "the opcode 0x49"),
    "list in itself": (P + b"]q\0h\0a.", "contains itself"), "dict in itself": (P + b"}q\0K\1h\0s.", "contains itself"),
    "metadata in itself": (P + ORDERED + b"q\0}X\x09\0\0\0_metadatah\0sb.", "contains itself"),
    "tuple in its list": (P + b"]q\0h\0\x85a.", "contains itself")}


@pytest.mark.parametrize("case", PICKLES)
def test_pickles_are_refused_by_what_they_hold(case, tmp_path):
    path = saved([torch.ones(3)], tmp_path)
    pickled, words = PICKLES[case]
    path.write_bytes(with_pickle(path, pickled))
    with pytest.raises(SourceError) as error, watched():
        read(path)
    said = str(error.value)
    assert words in said and said.startswith("'state.pt': ") and said.isprintable() and len(said) < 600


def nested(opener, depth, closer=b""):
    return P + opener * depth + b"N" + closer * depth + b"."


def doubled(levels):
    """A tree in which each value is twice in the next: 2 to the power of `levels` values in a few bytes."""
    return P + b"N" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(levels)) + b"."


NUM = 200_000
BOMBS = {
    "lists in lists": nested(b"](", NUM, b"e"), "tuples in tuples": P + b"N" + b"\x85" * NUM + b".",
    "dicts in dicts": P + b"}K\1" * NUM + b"N" + b"s" * NUM + b".", "marks": P + b"(" * NUM + b".",
    "doubled tuples": doubled(60), "doubled lists": P + b"](]q\0" + b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(60)) + b"e.",
    "doubled in a call": doubled(60)[:-1] + b")R.", "doubled as a key": P + b"}" + doubled(60)[2:-1] + b"Ns.",
    "doubled as a storage": doubled(60)[:-1] + b"Q.",
    "doubled as a numel": P + tensor(numel=doubled(60)[2:-1]) + b".",
    "doubled as a shape": P + tensor(shape=doubled(60)[2:-1]) + b".",
    "deep by turns": P + b"](Nq\0" + b"".join(b"j" + struct.pack("<I", i) + b"\x85r" + struct.pack("<I", i + 1) for i in range(300)) + b"e.",
    "empty lists": P + b"(" + b"]" * NUM + b"t.", "empty dicts": P + b"(" + b"}" * NUM + b"t.",
    "ordered dicts": P + b"(" + ORDERED[:-2] + b"q\0)R" + b"h\0)R" * NUM + b"t.",
    "tuples": P + b"(" + b"N\x85" * NUM + b"t.",
    "memo": P + b"(" + b"".join(b"Nr" + struct.pack("<I", i * 20011 % 2**32) for i in range(NUM)) + b"t.",
    "far memo": P + b"Nr\xff\xff\xff\xff.", "numbers": P + b"(" + b"K\1" * NUM + b"t.",
    "integers": P + b"(" + b"\x8a\x09" * 1 + b"".join(b"\x8a\7" + struct.pack("<Q", i)[:7] for i in range(NUM)) + b"t.",
    "texts": P + b"(" + b"".join(b"X\4\0\0\0\xf0\x9f\x98\x80" for i in range(NUM)) + b"t.",
    "keys": P + b"}(" + b"".join(b"J" + struct.pack("<i", i << 12) + b"N" for i in range(NUM)) + b"u.",
    "storages": P + b"(" + b"".join(STORAGE.replace(b"X\1", b"X\6") % (b"%06d" % i, b"K\1") for i in range(NUM // 40)) + b"t.",
    "tensors of one shape": P + b"(" + b"K\1" * 1000 + b"tq\0" + tensor(shape=b"h\0", strides=b"h\0") + b".",
    "text of 4 GB": P + b"X\xff\xff\xff\xff.", "binary text": P + b"U\xff.", "frames": P + b"\x95" + b"\xff" * 8 + b".",
    "pops": P + b"(N0" * NUM + b"."}


@pytest.mark.parametrize("case", BOMBS)
def test_bombs_cost_what_their_bytes_cost(case):
    """Time and memory are bounded by the length, whatever they describe; what is no value is refused."""
    started, result = time.process_time(), None
    with watched() as peak:
        try:
            result = read_pickle(BOMBS[case])
        except ValueError as error:
            assert str(error).isprintable() and len(str(error)) < 600
    assert peak[0] < 40 * len(BOMBS[case]) + 2**20, peak[0] / len(BOMBS[case])
    assert time.process_time() - started < 10
    refused = case not in ("numbers", "memo", "far memo", "texts", "keys", "integers")
    assert (result is None) == refused or case == "integers"


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


NUMBERS = [0, 1, 2, 3, 22, 30, 46, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFE, 0xFFFFFFFF, 1 << 32, 1 << 63, (1 << 64) - 1]
STEPS = [bytes([code]) for code in b"()]}tae su0NRbQ.\x85\x86\x87\x88\x89"] + [
    b"h\0", b"h\5", b"j\0\1\0\0", b"q\0", b"q\7", b"r\xff\xff\xff\xff", b"K\0", b"K\xff", b"M\0\1", b"J\xff\xff\xff\xff",
    b"\x8a\1\xff", b"\x8a\x09" + b"\xff" * 9, b"G" + b"\x7f" * 8, b"X\0\0\0\0", b"X\1\0\0\0a", b"X\7\0\0\0storage",
    ORDERED, TENSOR, b"ctorch\nHalfStorage\n", b"cposix\nsystem\n", b"cbuiltins\nexec\n", b"X\4\0\0\0true\x85R", tensor(),
    b"\x93", b"\x81", b"o", b"itorch\nload\n", b"\x95", b"]q\1h\1a"]


def mutated(rng, content, pickled, path):
    """A file with bytes, numbers, signs of the zip, or opcodes of the pickle put in, left out, doubled or exchanged."""
    kind = rng.randrange(4)
    if kind == 0:
        steps = opcodes(pickled)
        for _ in range(rng.choice((1, 1, 2, 3, 8))):
            at, other = rng.randrange(len(steps)), rng.randrange(len(steps))
            steps[at:at + rng.randrange(2)] = [rng.choice((rng.choice(STEPS), steps[other], b"", steps[at] + steps[other]))]
        return with_pickle(path, b"".join(steps))
    if kind == 1:
        raw = bytearray(pickled)
        for _ in range(rng.choice((1, 1, 2, 5))):
            raw[rng.randrange(len(raw))] = rng.choice((rng.randrange(256), raw[rng.randrange(len(raw))]))
        return with_pickle(path, bytes(raw))
    made = bytearray(content)
    signs = [at for sign in (b"PK\1\2", b"PK\3\4", b"PK\5\6", b"PK\6\6", b"PK\6\7", b"PK\7\10")
             for at in range(len(made)) if made.startswith(sign, at)]
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = min(rng.choice(signs) + rng.randrange(60), len(made) - 8) if kind == 2 else rng.randrange(len(made) - 8)
        size = rng.choice((1, 2, 4, 8))
        old = int.from_bytes(made[at:at + size], "little")
        number = rng.choice((rng.choice(NUMBERS), old + rng.choice((-1, 1, 64)), old ^ 1 << rng.randrange(8 * size)))
        made[at:at + size] = (number % (1 << 8 * size)).to_bytes(size, "little")
    cut = rng.randrange(len(made))
    return bytes(made if rng.random() < 0.9 else made[:cut] if rng.random() < 0.5 else made[:cut] + made[cut + 7:])


def tried(path, content, is_traced):
    """True where a file was accepted. What is accepted, torch reads as the same."""
    path.write_bytes(content)
    try:
        with watched(is_traced) as peak:
            file = read(path)
    except StreamReshardError as error:
        assert str(error).isprintable() and len(str(error)) < 900 and "fuzzed.pt" in str(error)
        return False
    finally:
        assert peak[0] < 2**20, f"{peak[0]} bytes"
    theirs = torch.load(path, weights_only=True, map_location="cpu")
    assert_same(file.contents, theirs, file, content)
    write_pickle(file.contents)
    return True


def fuzz(seeds, tmp_path, count, figures):
    """Tries `count` mutated files; anything but an error for people is a violation."""
    rng, violations, num_accepted = random.Random(count), [], 0
    pickles = [(path, content, pickle_of(content)) for path, content in seeds]
    for number in range(count):
        path, content, pickled = rng.choice(pickles)
        made = mutated(rng, content, pickled, path)
        try:
            num_accepted += tried(tmp_path / "fuzzed.pt", made, number % 8 == 0)
        except Exception as error:
            violations.append((number, repr(error)[:2000]))
    figures(f"mutated files of torch, {num_accepted} accepted", count, violations)


def test_mutated_files(seeds, tmp_path, figures):
    fuzz(seeds, tmp_path, 3000, figures)


@pytest.mark.heavy
def test_many_mutated_files(seeds, tmp_path, figures):
    fuzz(seeds, tmp_path, 100_000, figures)
