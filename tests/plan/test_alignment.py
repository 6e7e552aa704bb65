"""Headers are padded so that what the source has in one piece keeps its offset modulo a block; by an oracle of values.

Every float32 of a source is its own number, so an element of a target file says itself where it stands in the source.
"""
from collections import Counter

import numpy as np
import pytest
from safetensors import safe_open
from test_laws import write_source

from stream_reshard.convert.conversion import Options, plan_conversion, run_conversion
from stream_reshard.plan.alignment import MIN_CLONED_NBYTES, AlignmentRequest, begin_for
from stream_reshard.storage.header import BLOCK_NBYTES

SIZES = {"hidden_size": 144, "intermediate_size": 264, "vocab_size": 101, "num_hidden_layers": 2,
         "num_attention_heads": 12, "num_key_value_heads": 4}
"""Rows of 576 bytes, so that tensors begin all over the blocks; some are smaller than two blocks, others not."""


def distances(path, source):
    """(natural begin, begin, per element the source's offset minus its own, from the data's begin) of a target file."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    text = raw[8:8 + length].rstrip(b" ")
    values = np.frombuffer(raw[8 + length:], np.float32)
    values = values[values > 0]  # Padding rows stand behind the others.
    offsets = source["begin"] + 4 * (values.astype(np.int64) - 1)
    return 8 + -(-len(text) // 8) * 8, 8 + length, offsets - 4 * np.arange(len(values))


@pytest.mark.parametrize("tp, flags", [(1, {}), (2, {}), (4, {}), (2, {"rope": "interleaved"})])
def test_most_bytes_keep_their_offset_with_the_least_padding(tmp_path, tp, flags):
    write_source(tmp_path / "hf", **SIZES)
    run_conversion(plan_conversion(Options(tmp_path / "hf", tmp_path / "nt", tp=tp, **flags)))
    source = {"begin": 8 + int.from_bytes((tmp_path / "hf" / "model.safetensors").read_bytes()[:8], "little")}
    seen = Counter()
    for path in sorted((tmp_path / "nt").rglob("*.safetensors")):
        least, begin, distance = distances(path, source)
        changes = np.flatnonzero(np.diff(distance)) + 1
        pieces = [(int(piece[0]), 4 * len(piece)) for piece in np.split(distance, changes)]
        # q, k and v stand together, gate and up: up to three pieces, unless columns or rows are put in another order.
        is_whole = len(pieces) <= 3 and path.stat().st_size - begin >= MIN_CLONED_NBYTES
        if "qkv_proj" in path.as_posix() and flags:
            pieces = pieces[-1:]  # v keeps its order.
            is_whole = True
        seen[is_whole] += 1
        wanted = Counter()
        for start, nbytes in pieces if is_whole else ():
            wanted[start % BLOCK_NBYTES] += nbytes
        fitting = [least + extra for extra in range(0, BLOCK_NBYTES, 8)
                   if is_whole and wanted[(least + extra) % BLOCK_NBYTES] == max(wanted.values())]
        assert begin == (min(fitting) if fitting else least), path
        with safe_open(path, "np") as file:
            assert list(file.keys()) == ["data"] and begin % 8 == 0
    assert seen[True] > 3 and seen[False] > 3


def test_two_runs_pad_alike_and_the_plan_knows_every_size(tmp_path):
    write_source(tmp_path / "hf", **SIZES)
    conversion = plan_conversion(Options(tmp_path / "hf", tmp_path / "nt", tp=2))
    run_conversion(conversion)
    sizes = {file.path: file.nbytes for file in conversion.plan.target.files}
    assert sizes == {path.relative_to(tmp_path / "nt").as_posix(): path.stat().st_size
                     for path in (tmp_path / "nt").rglob("*.safetensors")}
    again = plan_conversion(Options(tmp_path / "hf", None, tp=2)).plan
    assert sizes == {file.path: file.nbytes for file in again.target.files}


WISHES = [
    ("nothing wished", [], 88),
    ("the nearest byte from the least on", [(0, 4096, 9)], 4096),
    ("none is needed", [(88, 0, 9)], 88),
    ("one step back is a block ahead", [(80, 0, 9)], 80 + 4096),
    ("shifts may be negative", [(104, -8, 9)], 96),
    ("most bytes win", [(96, 0, 9), (104, 0, 10)], 104),
    ("together", [(96, 0, 9), (104, 0, 10), (4096, 96, 2)], 96),
    ("the first of two that weigh the same", [(104, 0, 9), (96, 0, 9)], 96),
    ("data begin at steps of 8", [(97, 0, 99), (96, 0, 9)], 96),
    ("nothing else is wished", [(97, 0, 99)], 88)]


@pytest.mark.parametrize("wishes, begin", [pytest.param(*row[1:], id=row[0]) for row in WISHES])
def test_choice(wishes, begin):
    assert begin_for([AlignmentRequest(i, shift, nbytes) for i, (_, shift, nbytes) in enumerate(wishes)],
                     [first for first, *_ in wishes], 88) == begin


def test_jobs_come_in_the_order_of_the_source_and_hold_what_is_fused(tmp_path):
    """One job per Nanotron parameter with all its ranks; no two jobs hold the same parameter or file."""
    write_source(tmp_path / "hf", **SIZES)
    plan = plan_conversion(Options(tmp_path / "hf", None, tp=4, pp=2)).plan
    jobs = list(plan.jobs)
    firsts = [min(held.tensor.begin for name in job.parameters for held in plan.source.slices[name]) for job in jobs]
    assert firsts == sorted(firsts)
    names = [name for job in jobs for name in job.parameters]
    assert sorted(names) == sorted(set(names)) and len(jobs) == 3 + 2 * 6
    for job in jobs:
        assert {held.tensor.file for name in job.parameters for held in plan.target.slices[name]} == {
            file.path for file in job.files}
        assert len(job.files) in (1, 4)
    assert sum(len(job.files) for job in jobs) == plan.target.num_files
