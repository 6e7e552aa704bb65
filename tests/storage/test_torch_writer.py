"""Files of torch.save, written without torch: every offset is known before, pieces come in any order, and what no test
machine wants to hold is laid out as torch lays it out."""
import os
import pickle
import random
import zlib
from collections import OrderedDict

import pytest
import torch
from torch_files import read, records_of, saved, without_id, written_again

from stream_reshard.storage.crc32 import Piece, combined, crc_of_pieces
from stream_reshard.storage.pickle_writer import write_pickle
from stream_reshard.storage.restricted_pickle import read_pickle
from stream_reshard.storage.torch_values import new_storage, new_tensor, strides_of
from stream_reshard.storage.torch_writer import plan_torch_file, stream


def test_crcs_are_combined():
    rng = random.Random(1)
    for size in (0, 1, 2, 3, 63, 64, 1000, 70001):
        for _ in range(20):
            content = rng.randbytes(size)
            at = rng.randint(0, size)
            assert combined(zlib.crc32(content[:at]), zlib.crc32(content[at:]), size - at) == zlib.crc32(content)


def test_crcs_of_much_are_combined():
    """As many zeros as nobody writes: the CRC of twice as many comes from that of one half."""
    crc, nbytes = zlib.crc32(b"\0"), 1
    while nbytes < 2**26:
        crc, nbytes = combined(crc, crc, nbytes), 2 * nbytes
    assert crc == zlib.crc32(bytes(2**26))


def test_pieces_may_come_in_any_order_but_each_once():
    content = random.Random(2).randbytes(5000)
    ends = [0, 1, 1, 700, 701, 4096, 5000]
    parts = [Piece(a, b - a, zlib.crc32(content[a:b])) for a, b in zip(ends, ends[1:])]
    for seed in range(20):
        random.Random(seed).shuffle(parts)
        assert crc_of_pieces(parts, 5000) == zlib.crc32(content)
    parts = [part for part in parts if part.nbytes]
    for wrong in (parts[1:], parts[:-1], [*parts, parts[0]], []):
        with pytest.raises(AssertionError):
            crc_of_pieces(wrong, 5000)


def contents():
    """Values with new tensors, two of which share a storage."""
    whole = new_storage("F32", 30)
    return {"state": {i: {"step": new_tensor("F32", ()), "exp_avg": new_tensor("BF16", (3, i))} for i in range(3)},
            "masters": [new_tensor("F32", (2, 5), whole, 10 * i, True) for i in range(3)], "fp8": new_tensor("F8_E4M3", (5,))}


def test_several_workers_write_one_file(tmp_path):
    """Their pieces come in any order; seams and the end follow when the CRCs are known. It is the file
    that torch makes of the same values."""
    new, rng = plan_torch_file(contents(), "state"), random.Random(3)
    numbers = {id(record.storage): rng.randbytes(record.nbytes) for record in new.storages}
    writes, crcs = [], []
    for record in new.storages:
        content = numbers[id(record.storage)]
        cuts = sorted({0, len(content), *(rng.randint(0, len(content)) for _ in range(3))})
        parts = list(zip(cuts, cuts[1:]))
        writes += [(record.begin + a, content[a:b]) for a, b in parts]
        crcs.append(crc_of_pieces([Piece(a, b - a, zlib.crc32(content[a:b])) for a, b in parts], record.nbytes))
    writes += [new.seam(i, crcs[i - 1] if i else 0) for i in range(len(crcs))]
    writes.append(new.end(crcs))
    assert sum(len(content) for _, content in writes) == new.nbytes
    rng.shuffle(writes)
    descriptor = os.open(tmp_path / "state.pt", os.O_CREAT | os.O_WRONLY)
    for offset, content in writes:
        os.pwrite(descriptor, content, offset)
    os.close(descriptor)
    written = (tmp_path / "state.pt").read_bytes()
    assert written == b"".join(stream(new, lambda storage: [numbers[id(storage)]]))
    assert records_of(written)["state/data/0"] == numbers[id(new.storages[0].storage)]
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    torch.save(loaded, tmp_path / "state.pt")
    assert without_id((tmp_path / "state.pt").read_bytes()) == without_id(written)


def test_the_same_values_make_the_same_bytes():
    first, second = (b"".join(stream(plan_torch_file(contents(), "x"), lambda storage: [bytes(storage.nbytes)]))
                     for _ in range(2))
    assert first == second
    other = b"".join(stream(plan_torch_file(contents(), "x"), lambda storage: [b"\1" * storage.nbytes]))
    assert without_id(other) != without_id(first) and len(other) == len(first)


def tree(rng, depth, made):
    """A random tree of plain values; parts of it are met again, as the same objects or as equal ones."""
    kind = rng.randrange(9 if depth else 5 if made else 3)
    if kind == 0:
        return rng.choice((None, True, False, (), 0.5, -0.0))
    if kind == 1:
        return rng.choice((1, -1)) * rng.randrange(1 << rng.randrange(1, 64))
    if kind == 2:
        return rng.choice(("storage", "cpu", "a", "", "\u00e9" * rng.randrange(300), f"x{rng.randrange(9)}"))
    if kind < 5 and made:
        return rng.choice(made)
    size = rng.choice((0, 1, 1, 2, 3, 4, 5)) if rng.random() < 0.98 else rng.choice((999, 1000, 1001, 2000, 2001))
    items = [tree(rng, depth - 1, made) if depth and size < 9 else tree(rng, 0, []) for _ in range(size)]
    keys = rng.sample([*range(3000), *(f"k{i}" for i in range(9))], size)
    made.append(rng.choice((list, tuple, dict, OrderedDict))(zip(keys, items) if kind > 6 else enumerate(items)))
    return made[-1]


def test_pickles_are_those_of_the_pickler_in_c():
    """Whatever plain values they hold, and read they are the same values."""
    for seed in range(1500):
        value = tree(random.Random(seed), 4, [])
        assert write_pickle(value)[0] == pickle.dumps(value, 2), seed
        assert repr(read_pickle(pickle.dumps(value, 2))[0]) == repr(value), seed


@pytest.mark.parametrize("value", [{1, 2}, b"x", 1j, object(), [range(3)], {"a": type}, new_storage("F32", 3)])
def test_what_is_no_value_of_a_state_is_not_written(value):
    with pytest.raises(TypeError, match="cannot be saved"):
        write_pickle(value)


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3), (2, 0, 3), (1, 1), (4, 1, 5, 2)])
def test_strides_are_torch_s(shape):
    assert strides_of(shape) == torch.empty(shape).stride()


def test_too_few_bytes_are_noticed():
    with pytest.raises(AssertionError, match="were planned"):
        list(stream(plan_torch_file([new_tensor("F32", (4,))], "x"), lambda storage: [bytes(15)]))


@pytest.mark.parametrize("counts", [(2**30 + 1, 1, 3), (3, 2**30 - 1, 5), (2**30 - 30, 2**20, 7, 2**31, 9)])
def test_files_beyond_4_gib_are_laid_out_as_torch_does(counts, tmp_path):
    """Records of more than 4 GiB and records behind 4 GiB, without their bytes: torch leaves holes for them, and 0 for
    their CRCs. All else is compared, and read."""
    with torch.serialization.skip_data():
        torch.save([torch.empty(n) for n in counts], path := tmp_path / "state.pt")
    new = plan_torch_file([new_tensor("F32", (n,)) for n in counts], "state")
    assert path.stat().st_size == new.nbytes
    with open(path, "rb") as file:
        for index in range(len(counts)):
            offset, seam = new.seam(index, 0)
            file.seek(offset)
            assert file.read(len(seam)) == seam, index
        offset, end = new.end([0] * len(counts))
        file.seek(offset)
        assert masked(file.read(), new, offset) == masked(end, new, offset)
    found = read(path)
    assert [found.begin_of(tensor) for tensor in found.contents] == [record.begin for record in new.storages]


def masked(end, new, offset):
    """The end of a file without its serialization_id and the two places of that one's CRC."""
    record, end = new.after[1], bytearray(end)
    begin, entry = record.begin - offset, end.rindex(b"PK\1\2")
    for first, last in ((begin, begin + 40), (begin + 44, begin + 48), (entry + 16, entry + 20)):
        end[first:last] = b"?" * (last - first)
    return end


@pytest.mark.heavy
def test_more_records_than_a_zip_counts(tmp_path):
    """Beyond 65,535 records the count stands in the zip64 record alone."""
    path = saved([torch.full((2,), i) for i in range(66000)], tmp_path)
    assert without_id(written_again(path)) == without_id(path.read_bytes())
