"""Mutated paths, shapes and slices of Nanotron's files: refused, or they mean what Nanotron and numpy take them for."""
import math
import random
import re
from collections import Counter

import numpy as np
from headers import mutated

from stream_reshard.errors import SourceError
from stream_reshard.formats.nanotron.weight_files import parse_pairs, parse_path, parse_shape, parse_weight_file
from stream_reshard.storage.header import StoredTensor, TensorFile


def accepted(function, *arguments):
    """What the function returns; None where it raises a SourceError, which has a short text. Nothing else is raised."""
    try:
        return function(*arguments)
    except SourceError as error:
        assert str(error).isprintable() and len(str(error)) < 700, f"{error!s:.700}"


def numbers_of(text):
    """A shape as its text says it, with numpy's words taken away."""
    plain = re.sub(r"np\.int64\((\d+)\)", r"\1", text)
    assert re.fullmatch(r"\(\d+(, \d+)*,?\)", plain), text
    return tuple(int(part) for part in plain[1:-1].split(",") if part)


def assert_agrees(text, pairs, shape, unsharded):
    """Slicing arrays by the text, as Nanotron does, and by the boxes gives the same elements.

    Every slice is plain and in bounds, both sides match, and the tensor is taken exactly once.
    """
    arrays = [np.arange(math.prod(extents)).reshape(extents) for extents in (shape, unsharded)]
    seen = np.zeros(shape, int)
    for pair, boxes in zip(text.split(";"), pairs, strict=True):
        sides = [tuple(slice(*(None if n == "None" else int(n) for n in part.split(","))) for part in side.split("|"))
                 for side in pair.split("#")]
        for side, box, array in zip(sides, boxes, arrays, strict=True):
            for s, n in zip(side, array.shape, strict=True):
                assert s.step in (None, 1) and (s.start, s.stop) == (None, None) or 0 <= s.start <= s.stop <= n, text
            assert np.array_equal(array[side], array[tuple(map(slice, box.start, box.stop))]), text
        assert arrays[0][sides[0]].shape == arrays[1][sides[1]].shape, text
        seen[sides[0]] += 1
    assert (seen == 1).all(), text


def path_of(parameter, place):
    """The path under which Nanotron saves a parameter (`get_path`, nanotron/serialize/utils.py)."""
    *folders, suffix = parameter.split(".")
    rank = f"_pp-rank-{place.pp}-of-{place.num_pp}_tp-rank-{place.tp}-of-{place.num_tp}" if place else ""
    return "/".join(["model/model", *folders, f"model_{suffix}{rank}.safetensors"])


ALL = "None,None,None"
PAIRS = [f"{ALL}|{ALL}#0,2,None|{ALL}", f"{ALL}|{ALL}#{ALL}|2,4,None",
         f"0,1,None|{ALL}#1,2,None|{ALL};1,2,1|{ALL}#3,4,None|{ALL}",
         "0,2,1|0,2,None#0,2,1|0,2,1;0,2,None|2,2,None#0,2,None|4,4,None",
         f"0,0,None|{ALL}#4,4,None|2,4,None;{ALL}|0,2,1#2,4,1|0,2,None"]
SHAPES = ["(4, 4)", "(4,)", "(np.int64(4), 4)", "(np.int64(4),)", "(1, 2, 3, 4, 5, 6, 7, 8)", "(0, 16)"]
PATHS = [f"model/model/{rest}.safetensors" for rest in (
    "decoder/0/pp_block/attn/qkv_proj/model_weight_pp-rank-0-of-1_tp-rank-1-of-2",
    "final_layer_norm/pp_block/model_weight", "lm_head/pp_block/model_bias_pp-rank-1-of-2_tp-rank-0-of-1")]
WORDS = [word.encode("utf-8", "surrogatepass") for word in [
    "None", "0", "1", "2", "4", "-1", "00", "9" * 15, "9" * 16, "9" * 5000, "1e0", "0x1", "1_0", "\u0661", " ", "\n",
    "\0", "", ",", "|", "#", ";", "(", ")", "np.int64(2)", "np.int32(2)", ALL, "0,2,None", "1,2,2", "2,0,None",
    "0,5,None", "../", "/", ".", "_pp-rank-0-of-1", "_tp-rank-2-of-2", ".safetensors", "\x1b[2J", "\ud800",
    "__import__('os')", "a" * 9999, ";" * 99]]
TWINS = [(b", ", b","), (b"0", b"00"), (b"None", b"1"), (b"/", b"."), (b"4", b"np.int64(4)"), (b"-", b"--"),
         (b"rank", b"Rank")]


def garbled(rng, text):
    """One text in five as it is, the others with one to three edits."""
    return text if rng.random() < 0.2 else mutated(
        rng, text.encode("utf-8", "surrogateescape"), WORDS, TWINS).decode("utf-8", "surrogateescape")


def test_shapes_and_slices():
    """Of 35,000 texts those that are accepted mean what numpy says they mean."""
    rng, counts = random.Random(11), Counter()
    for _ in range(20_000):
        text, shape = garbled(rng, rng.choice(PAIRS)), rng.choice([(2, 2)] * 6 + [(2, 4), (0, 4), (4,)])
        if (pairs := accepted(parse_pairs, text, shape, (4, 4))) is not None:
            assert_agrees(text, pairs, shape, (4, 4))
            counts["pairs"] += 1
        text = garbled(rng, rng.choice(SHAPES))
        if (shape := accepted(parse_shape, text)) is not None:
            assert shape == numbers_of(text) and 0 < len(shape) <= 8, text
            counts["shapes"] += 1
    assert min(counts.values()) > 1500 and len(counts) == 2, counts


def test_paths():
    """Of 15,000 paths those are accepted that Nanotron writes for the very parameter and rank they are taken for."""
    rng, taken, wrong = random.Random(12), 0, set()
    for _ in range(15_000):
        text = garbled(rng, rng.choice(PATHS))
        if (told := accepted(parse_path, text)) is not None:
            taken += 1
            inside = told[1] is None or told[1].pp < told[1].num_pp and told[1].tp < told[1].num_tp
            wrong |= {text} if path_of(*told) != text or not inside else set()
    assert taken > 3000 and not wrong, (len(wrong), sorted(wrong)[:10])


def test_weight_files():
    """What a header says is taken together or not at all: 15,000 files with fields garbled, left out, added."""
    rng, taken = random.Random(13), 0
    for _ in range(15_000):
        fields = {"version": "1.5", "unsharded_shape": "(4, 4)", "local_global_slices_pairs": rng.choice(PAIRS)}
        for key in rng.choices([*fields, "x"], k=rng.choice((0, 1, 1, 2))):
            old = fields.pop(key, "")
            fields |= {key: garbled(rng, old)} if rng.random() < 0.8 else {}
        path, shape, keys = rng.choice(PATHS), rng.choice([(2, 2)] * 4 + [(2, 4), (2,), (0, 4), (1,) * 999, ()]), \
            rng.choice(["data"] * 8 + ["x", "xy"])
        tensors = tuple(StoredTensor(path, key, "BF16", shape, 8) for key in (["data"] if keys == "data" else keys))
        told = accepted(parse_weight_file, TensorFile(path, tensors, tuple(fields.items())))
        if told is not None and told.rank:
            taken += 1
            assert set(fields) == {"version", "unsharded_shape", "local_global_slices_pairs"}
            assert fields["version"] == told.version
            assert told.unsharded_shape == numbers_of(fields["unsharded_shape"]) and keys == "data"
            if math.prod(told.unsharded_shape) < 10**6:
                assert_agrees(fields["local_global_slices_pairs"], told.pairs, shape, told.unsharded_shape)
    assert 500 < taken < 10_000, taken
