"""Pickles that only look like torch's: refused in one line, without running or importing what they name, in little
memory."""
import pickle
import struct
import time

import pytest
import torch
from torch_files import read, saved, with_pickle
from torch_pickles import P, ORDERED, STORAGE, TENSOR, Call, tensor
from watching import watched

from stream_reshard.errors import SourceError
from stream_reshard.storage.restricted_pickle import read_pickle




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


NUM = 50_000
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
    assert peak[0] < 40 * len(BOMBS[case]) + 2**18, peak[0] / len(BOMBS[case])
    assert time.process_time() - started < 3
    refused = case not in ("numbers", "memo", "far memo", "texts", "keys", "integers")
    assert (result is None) == refused or case == "integers"
