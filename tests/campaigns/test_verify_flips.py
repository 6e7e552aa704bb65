"""Verify finds every flipped bit: of a whole folder anywhere, of one without manifest in all that is the model."""
import random

import pytest
from damage import every, poke
from trees import raw_of


def flips(root, kinds, number, seed=0):
    """`number` random bits of files below a folder, evenly over kinds of place: (file, byte, bit)."""
    chooser, files = random.Random(seed), [path for path in every(root) if path.suffix == ".safetensors"]
    for i in range(number):
        kind = kinds[i % len(kinds)]
        path = chooser.choice(files) if kind in ("weights", "header") else root / kind
        begin = raw_of(path)[1] if path in files else 0
        first, last = (0, begin) if kind == "header" else (begin, path.stat().st_size)
        yield path, chooser.randrange(first, last), chooser.randrange(8)


@pytest.mark.parametrize("number", [60, pytest.param(1000, marks=pytest.mark.heavy)])
@pytest.mark.parametrize("bare", [False, True], ids=["whole folder", "model without manifest"])
def test_every_bit_flip_is_found(made, copied, verify, figures, number, bare):
    """With a manifest anywhere, and the file is named; without one in every bit of header and data below model/."""
    root, missed = copied("tp2pp2", bare), []
    documents = [] if bare else sorted(path.name for path in root.iterdir() if path.is_file())
    for path, byte, bit in flips(root, ["weights", "header", *documents], number):
        poke(path, byte, bit)
        code, _, problems = verify(made("hf"), root)
        if code != 5 or not (bare or path.relative_to(root).as_posix() in "\n".join(problems)):
            missed.append((path.relative_to(root), byte, bit, code, problems))
        poke(path, byte, bit)
    assert verify(made("hf"), root)[0] == 0
    figures(f"bit flips, {'below model/ without manifest' if bare else 'anywhere'}", number, missed)
