"""The limit on memory is kept, whatever the tensor sizes; one that cannot be is refused before anything is written.

Peaks are sums of the resident sets of the whole process tree, sampled from outside, beside VmHWM that the run prints.
"""
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from running import peak_until_it_ends
from trees import write_sparse_source

from stream_reshard import api
from stream_reshard.machine.memory import parse_nbytes

ROOT = Path(__file__).parents[2]


def peak_of(command):
    """(peak of the tree's summed resident set in bytes, stdout) of a command that must succeed."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT)
    peak = peak_until_it_ends(process)
    assert process.returncode == 0
    return peak, process.stdout.read().decode()


@pytest.mark.parametrize("flags", [(), ("--dtype", "float32")], ids=["as it is", "cast"])
@pytest.mark.parametrize("limit", ["64MiB", "128MiB", "256MiB", "512MiB"])
def test_peak_keeps_the_limit(tmp_path, limit, flags):
    write_sparse_source(tmp_path / "hf", vocab=200_000)
    workers = ["--workers", "1"] if limit == "64MiB" else []
    peak, out = peak_of([sys.executable, "-m", "stream_reshard", str(tmp_path / "hf"), str(tmp_path / "nt"), "--tp",
                         "4", "--max-memory", limit, "--json", *workers, *flags])
    facts = json.loads(out)
    assert max(peak, facts["peak_nbytes"]) <= facts["memory"]["projected"] <= parse_nbytes(limit)
    assert facts["memory"]["reserved"] < facts["peak_nbytes"]


def test_a_cast_of_which_every_weight_is_counted_keeps_64_mib(tmp_path):
    write_sparse_source(tmp_path / "hf", vocab=60_000)
    with open(tmp_path / "hf" / "model.safetensors", "r+b") as stream:
        num_left = os.fstat(stream.fileno()).st_size - stream.seek(8 + int.from_bytes(stream.read(8), "little"))
        while num_left:
            num_left -= stream.write(b"\x7f" * min(num_left, 2**20))
    peak, out = peak_of([sys.executable, "-m", "stream_reshard", str(tmp_path / "hf"), str(tmp_path / "nt"), "--tp", "4",
                         "--dtype", "float16", "--max-memory", "64MiB", "--workers", "1", "--json"])
    assert peak <= 64 * 2**20 and json.loads(out)["num_overflowed"] > 60_000


def test_an_estimate_of_the_time_keeps_the_limit(tmp_path):
    write_sparse_source(tmp_path / "hf", vocab=200_000)
    peak, out = peak_of([sys.executable, "-m", "stream_reshard", "plan", str(tmp_path / "hf"), str(tmp_path / "nt"),
                         "--time", "--json", "--max-memory", "64MiB"])
    facts = json.loads(out)
    assert peak <= facts["memory"]["projected"] <= 64 * 2**20 < facts["time"]["nbytes_tried"]


def test_files_that_are_copied_pass_in_pieces(tmp_path):
    write_sparse_source(tmp_path / "hf", vocab=1000)
    with open(tmp_path / "hf" / "tokenizer.json", "wb") as stream:
        stream.truncate(100 * 2**20)
    peak, _ = peak_of([sys.executable, "-m", "stream_reshard", str(tmp_path / "hf"), str(tmp_path / "nt"),
                       "--max-memory", "64MiB", "--json"])
    assert peak <= 64 * 2**20
    assert (tmp_path / "nt" / "tokenizer.json").stat().st_size == 100 * 2**20


def strays(root, number):
    """Files of others in a source, half of them named as shards are."""
    for i in range(number):
        os.close(os.open(root / (f"stray-{i:06}.safetensors" if i % 2 else f"other-{i:06}.txt"), os.O_CREAT))


def test_nothing_is_kept_of_files_that_do_not_matter(tmp_path):
    write_sparse_source(tmp_path / "hf", vocab=1000)
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    strays(tmp_path / "hf", 1000)
    plan = api.plan(tmp_path / "hf", tmp_path / "nt", max_memory="8GiB")
    assert set(plan.identities) == {"config.json", "model.safetensors"} and set(plan.companions) == {"tokenizer.json"}
    assert len(repr(plan.output.run)) < 2000 and len("".join(plan.notes)) < 1000
    assert "and 484 more" in "".join(plan.notes)


@pytest.mark.heavy
def test_a_source_among_200_000_other_files_keeps_64_mib(tmp_path):
    write_sparse_source(tmp_path / "hf", vocab=1000)
    strays(tmp_path / "hf", 200_000)
    command = [sys.executable, "-m", "stream_reshard", str(tmp_path / "hf"), str(tmp_path / "nt"), "--max-memory", "64MiB"]
    begin = time.monotonic()
    assert max(peak_of(command)[0], peak_of([*command[:3], "plan", *command[3:]])[0]) <= 64 * 2**20
    assert time.monotonic() - begin < 30


@pytest.mark.heavy
def test_a_4_gb_embedding_passes_through_64_mib(tmp_path):
    write_sparse_source(tmp_path / "hf", vocab=2_000_000)
    peak, _ = peak_of([sys.executable, "-m", "stream_reshard", str(tmp_path / "hf"), str(tmp_path / "nt"), "--tp", "2",
                       "--max-memory", "64MiB", "--workers", "1", "--json"])
    assert peak <= 64 * 2**20


def test_a_limit_that_cannot_be_kept_is_refused(tmp_path):
    write_sparse_source(tmp_path / "hf", vocab=1000)
    run = subprocess.run([sys.executable, "-m", "stream_reshard", str(tmp_path / "hf"), str(tmp_path / "nt"),
                          "--max-memory", "24MiB"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 6 and "cannot be kept" in run.stderr and "Traceback" not in run.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_sizes():
    assert parse_nbytes("64MiB") == 64 * 2**20 and parse_nbytes("1.5 gb") == 1_500_000_000 and parse_nbytes("7") == 7
