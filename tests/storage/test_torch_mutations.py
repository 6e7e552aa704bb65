"""Mutated files of torch: nothing in them is run, and whatever is accepted, torch reads as the same values."""
import random
from collections import OrderedDict

import pytest
import torch
from torch_files import assert_same, read, saved, with_pickle
from torch_pickles import ORDERED, TENSOR, opcodes, pickle_of, tensor
from watching import watched

from stream_reshard.errors import StreamReshardError
from stream_reshard.storage.pickle_writer import write_pickle


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
