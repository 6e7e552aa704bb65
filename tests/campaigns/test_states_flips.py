"""Verify finds every flipped bit in the files of a training state: in data, headers, seams and directory, without a
manifest."""
import random

import pytest
from damage import every, poke
from training import make_training

SIZES = [{"tp": 2, "dp": 2, "zero": 1}, {"pp": 2, "tied": True}]


def spots(root, number, seed=0):
    """Random bytes of files, and of some files those at the ends, where a zip has its header and its directory."""
    chooser = random.Random(seed)
    files = every(root, "optimizer/") + every(root, "lr_scheduler/")
    for i in range(number):
        path = chooser.choice(files)
        size = path.stat().st_size
        last = min(size, 4000) - 1
        yield path, [chooser.randrange(size), chooser.randint(0, last), size - 1 - chooser.randint(0, last)][i % 3]


@pytest.mark.parametrize("number", [20, pytest.param(1000, marks=pytest.mark.heavy)])
@pytest.mark.parametrize("sizes", SIZES, ids=["ZeRO-1", "ZeRO-0"])
def test_every_bit_flip_of_a_state_is_found(tmp_path, verify, figures, number, sizes):
    source, copy = (make_training(tmp_path / name, tied=sizes.get("tied", False), **more) for name, more in (
        ("a", {}), ("b", {key: size for key, size in sizes.items() if key != "tied"})))
    missed = []
    for path, byte in spots(copy, number):
        bit = byte % 8
        poke(path, byte, bit)
        code, _, problems = verify(source, copy)
        if code != 5:
            missed.append((path.name, byte, bit, code, problems))
        poke(path, byte, bit)
    assert verify(source, copy)[0] == 0
    figures("bit flips in a training state", number, missed)
