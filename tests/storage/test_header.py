"""Headers: read strictly, packed to the byte; nothing gets in that safetensors refuses, or that its spec forbids."""
import random
import unicodedata

import numpy as np
import pytest
from headers import DATA, WITH_METADATA, assert_same_as_library, entry, library_accepts, one, rows, two
from safetensors.numpy import load
from sources import raw_file

from stream_reshard.errors import SourceError
from stream_reshard.storage.header import MAX_HEADER_NBYTES, header_of, pack_header, planned_file, read_header

REFUSED = [
    ("empty", b""),
    ("under 8 bytes", b"1234567"),
    ("no header", raw_file("", DATA)),
    ("length past the end", raw_file(one(), DATA, claimed=len(one()) + 9)),
    ("length 2**64 - 1", raw_file(one(), DATA, claimed=2**64 - 1)),
    ("length over the cap", raw_file(one(), DATA, claimed=MAX_HEADER_NBYTES + 1)),
    ("length under the header", raw_file(one(), DATA, claimed=len(one()) - 1)),
    ("list", raw_file(f"[{one()}]", DATA)),
    ("not UTF-8", raw_file(b'{"\xff":' + entry().encode() + b"}", DATA)),
    ("overlong UTF-8", raw_file(b'{"\xc0\xaf":' + entry().encode() + b"}", DATA)),
    ("one byte short", raw_file(one(), DATA[:-1])),
    ("one byte long", raw_file(one(), DATA + b"x")),
    ("zip behind it", raw_file(one(), DATA + b"PK\5\6" + bytes(18))),
    ("hole", raw_file(two("[0,4]", "[5,9]"), DATA + b"x")),
    ("hole in front", raw_file(one(shape="[3]", offsets="[2,8]"), DATA)),
    ("overlap", raw_file(two("[0,4]", "[2,6]"), DATA[:6])),
    ("one range, two names", raw_file(two("[0,4]", "[0,4]"), DATA[:4])),
    ("shape overflows", raw_file(one(shape="[1099511627776,1099511627776]"), DATA)),
    ("shape overflows to nothing", raw_file(one(shape="[1099511627776,1099511627776,0]", offsets="[0,0]"))),
    ("negative shape", raw_file(one(shape="[-4]"), DATA)),
    ("two negatives", raw_file(one(shape="[-2,-2]"), DATA)),
    ("NaN", raw_file(one(shape="[NaN]"), DATA)),
    ("Infinity", raw_file(one(offsets="[0,Infinity]"), DATA)),
    ("float shape", raw_file(one(shape="[4.0]"), DATA)),
    ("exponent", raw_file(one(shape="[4e0]"), DATA)),
    ("huge exponent", raw_file(one(shape="[1e400]"), DATA)),
    ("minus zero", raw_file(one(offsets="[-0,8]"), DATA)),
    ("text shape", raw_file(one(shape='["4"]'), DATA)),
    ("bool shape", raw_file(one(shape="[4,true]"), DATA)),
    ("shape is a number", raw_file(one(shape="4"), DATA)),
    ("negative offset", raw_file(one(offsets="[-8,0]"), DATA)),
    ("offsets reversed", raw_file(one(offsets="[8,0]"), DATA)),
    ("three offsets", raw_file(one(offsets="[0,4,8]"), DATA)),
    ("one offset", raw_file(one(offsets="[8]"), DATA)),
    ("shape and bytes differ", raw_file(one(shape="[3]"), DATA)),
    ("dtype of nobody", raw_file(one(dtype="F9"), DATA)),
    ("dtype I4", raw_file(one(dtype="I4", shape="[16]"), DATA)),
    ("dtype F4", raw_file(one(dtype="F4", shape="[16]"), DATA)),
    ("dtype F6", raw_file(one(dtype="F6_E2M3", shape="[8]", offsets="[0,6]"), DATA[:6])),
    ("dtype in lower case", raw_file(one(dtype="bf16"), DATA)),
    ("dtype is a list", raw_file(one().replace('"BF16"', '["BF16"]'), DATA)),
    ("metadata number", raw_file(WITH_METADATA % '{"a":1}', DATA)),
    ("metadata nested", raw_file(WITH_METADATA % '{"a":{}}', DATA)),
    ("metadata list", raw_file(WITH_METADATA % '["a"]', DATA)),
    ("metadata empty list", raw_file(WITH_METADATA % "[]", DATA)),
    ("metadata empty text", raw_file(WITH_METADATA % '""', DATA)),
    ("metadata false", raw_file(WITH_METADATA % "false", DATA)),
    ("metadata twice", raw_file('{"__metadata__":{},' + (WITH_METADATA % "{}")[1:], DATA)),
    ("metadata key twice", raw_file(WITH_METADATA % '{"a":"1","a":"1"}', DATA)),
    ("field twice", raw_file(one(rest=',"dtype":"BF16"'), DATA)),
    ("lone surrogate", raw_file(f'{{"\\ud800":{entry()}}}', DATA)),
    ("100,000 deep", raw_file('{"a":' + "[" * 100_000 + "]" * 100_000 + "}", DATA)),
    ("cut JSON", raw_file(one()[:-1], DATA)),
    ("two documents", raw_file(one() + one(), DATA)),
    ("a long number", raw_file(one(shape=f"[{'9' * 5000}]"), DATA)),
]

ONLY_THE_LIBRARY_ACCEPTS = [
    ("key twice, one range", raw_file(two("[0,4]", "[0,4]", "aa"), DATA[:4])),
    ("key twice, another dtype", raw_file(f'{{"a":{entry()},"a":{entry("F32", "[2]")}}}', DATA)),
    ("unknown field", raw_file(one(rest=',"x":1'), DATA)),
    ("leading space", raw_file(" " + one(), DATA)),
    ("leading newline", raw_file("\n" + one(), DATA)),
    ("no tensor", raw_file("{}")),
    ("no tensor but metadata", raw_file('{"__metadata__":{"a":"b"}}')),
]

ACCEPTED = [
    ("plain", one(), DATA),
    ("trailing spaces", one() + "   ", DATA),
    ("metadata", WITH_METADATA % '{"format":"pt"}', DATA),
    ("unordered", two("[4,8]", "[0,4]"), DATA),
    ("zero size", one(shape="[0,4]", offsets="[0,0]"), b""),
    ("scalar", one(dtype="F64", shape="[]"), DATA),
    ("empty name", one().replace('"a"', '""'), DATA),
    ("name with NUL", one().replace('"a"', r'"a\u0000b"'), DATA),
    ("name like a path", one().replace('"a"', '"../../etc/x.weight"'), DATA),
    ("NFC and NFD twins", two(keys=[unicodedata.normalize(form, "\u00e9") for form in ("NFC", "NFD")]), DATA),
    *[(dtype, one(dtype=dtype, shape=f"[{8 // size}]"), DATA) for dtype, size in
      [("F8_E4M3", 1), ("F8_E5M2", 1), ("F8_E8M0", 1), ("U16", 2), ("U32", 4), ("U64", 8), ("C64", 8), ("BOOL", 1)]],
]


@pytest.mark.parametrize("content", rows(REFUSED + ONLY_THE_LIBRARY_ACCEPTS))
def test_refused(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(SourceError, match=r"^'x\.safetensors'(: | in )") as refusal:
        read_header(tmp_path, "x.safetensors")
    text = str(refusal.value)
    assert text.isprintable() and len(text) < 500, text


@pytest.mark.parametrize("content", rows(ONLY_THE_LIBRARY_ACCEPTS))
def test_what_only_the_library_accepts(content):
    """Why the package has a reader of its own; a row that fails here may move to REFUSED."""
    assert library_accepts(content)


@pytest.mark.parametrize("header, data", rows(ACCEPTED))
def test_accepted(tmp_path, header, data):
    (tmp_path / "x.safetensors").write_bytes(raw_file(header, data))
    file = read_header(tmp_path, "x.safetensors")
    assert_same_as_library(file, raw_file(header, data))


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "loop.safetensors").symlink_to("loop.safetensors")
    for name in ("absent.safetensors", "folder.safetensors", "loop.safetensors"):
        with pytest.raises(SourceError, match=name):
            read_header(tmp_path, name)


def test_golden_bytes():
    packed = pack_header([("data", "BF16", (2, 3)), ("b", "F32", ())], {"k": "v\u00e9"})
    text = ('{"__metadata__":{"k":"v\u00e9"},"data":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]},'
            '"b":{"dtype":"F32","shape":[],"data_offsets":[12,16]}}').encode()
    assert len(text) == 142
    assert packed == (144).to_bytes(8, "little") + text + b"  "


def write_anew(path, content):
    """Write a file in place of another: emptying that one would make ext4 wait for the disk, 3,000 times."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def random_file(rng):
    """(tensors, metadata) of a random file, as `pack_header` takes them."""
    names = rng.sample(["data", "a", "\u00e9", "x.weight", "\U0001f600", 'q"\\', "\n", " ", "../y"], rng.randint(1, 5))
    tensors = [(name, rng.choice(["BF16", "F32", "I8", "F64"]),
                tuple(rng.randint(0, 5) for _ in range(rng.randint(0, 4)))) for name in names]
    return tensors, {key: rng.choice(["", "1.5", "(2, 3)", "\u00e9\t"]) for key in rng.sample("klm", rng.randint(0, 3))}


def test_packed_and_read_again(tmp_path):
    """Reading what was packed gives the planned file; packing it again, the same bytes; data begins at 8-byte steps."""
    rng = random.Random(7)
    for _ in range(200):
        tensors, metadata = random_file(rng)
        planned = planned_file("x.safetensors", tensors, metadata)
        header = pack_header(tensors, metadata)
        content = header + rng.randbytes(planned.nbytes - len(header))
        write_anew(tmp_path / "x.safetensors", content)
        read = read_header(tmp_path, "x.safetensors")
        assert set(read.tensors) == set(planned.tensors) and dict(read.metadata) == metadata
        assert header == header_of(planned) and len(header) % 8 == 0
        assert_same_as_library(read, content)


def test_library_loads_what_was_packed():
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    loaded = load(pack_header([("data", "F32", (2, 3))], {}) + values.tobytes())
    assert np.array_equal(loaded["data"], values)
