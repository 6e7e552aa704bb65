"""Faults while a training moves: its optimizer files are written by several jobs each, and are never half either."""
import json
import time

import pytest
from faults import Case, campaign, kill
from running import call
from test_faults import CODES, failed, killed, killed_at_random, sample
from test_faults_source import pool
from test_power_cut import Disk, cut, remove_above, unmount_all
from training import make_training

from stream_reshard.convert.conversion import Options, plan_conversion
from stream_reshard.run.writing import RunOptions, run

FLAGS = ("--to", "nanotron", "--tp", "2", "--dp", "2", "--zero", "1", "--quiet", "--workers", "1", "--max-memory",
         "4GiB")

FEW = pytest.param(6, id="sample")
MANY = pytest.param(120, id="many", marks=pytest.mark.heavy)


def make(root, **how):
    if not (root / "hf").exists():
        make_training(root / "hf", pp=2, config={"vocab_size": 14, "num_hidden_layers": 2})
    return Case(root, FLAGS, **how)


def make_timed(root):
    case = make(root)
    begin = time.monotonic()
    case.clear()
    case.run(flags=("--workers", "2"))
    case.seconds = time.monotonic() - begin
    return case


@pytest.mark.parametrize("number", [FEW, MANY])
def test_sigkill_before_and_after_every_call(quick_path, figures, number):
    (quick_path / "count").mkdir()
    count = len(make(quick_path / "count").operations)
    assert count > 200
    points = [(at, after) for at in range(1, count + 1) for after in (False, True)]
    figures("SIGKILL while a training moves", *campaign(quick_path, make, killed, sample(points, number)))


@pytest.mark.parametrize("number", [FEW, MANY])
def test_sigkill_at_random_times(quick_path, figures, number):
    figures("SIGKILL while a training moves, random", *campaign(quick_path, make_timed, killed_at_random,
                                                                range(number)))


@pytest.mark.parametrize("number", [FEW, MANY])
def test_errors_of_every_call(quick_path, figures, number):
    (quick_path / "count").mkdir()
    names = make(quick_path / "count").operations
    points = [(at, code, at) for at, name in enumerate(names, 1) for code in CODES.get(name, ())]
    figures("errors of calls while a training moves", *campaign(quick_path, make, failed, sample(points, number)))


def on_disk(folder):
    disk = Disk(folder, "ext4")
    case = make(folder, destination=disk.mounted / "made" / "nt", before=lambda case: remove_above(disk))
    case.disk = disk
    return case


@pytest.mark.heavy
def test_power_cuts(tmp_path, figures):
    (tmp_path / "count").mkdir()
    count = len(make(tmp_path / "count").operations)
    points = [None, *sample(range(1, count + 1), 60)]
    try:
        figures("power cuts while a training moves, ext4", *campaign(tmp_path, on_disk, cut, points))
    finally:
        unmount_all(tmp_path)


def test_what_a_stopped_run_wrote_is_kept(tmp_path, capsys):
    """Parts of files as well: the next run writes the others only."""
    case = make(tmp_path)
    case.clear()
    whole = moved(case, capsys)
    case.clear()
    case.run(kill(len(case.operations) // 3, False))
    assert 0 < moved(case, capsys) < whole
    assert case.tree() == case.wanted


def moved(case, capsys):
    """Bytes of tensors that a run writes."""
    capsys.readouterr()
    assert call(case.source, case.destination, *FLAGS[:-4], "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    return facts["nbytes_cloned"] + facts["nbytes_copied"] + facts["nbytes_strided"]


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)


def lengthen(path):
    path.write_bytes(path.read_bytes() + b"more")


def shorten(path):
    path.write_bytes(path.read_bytes()[:-9])


def change_sums(path):
    """The CRC-32 of the first tensor that each job wrote is another one."""
    records = [json.loads(line) for line in path.read_bytes().splitlines()]
    for record in records:
        if "job" in record:
            record["crc32"][0] ^= 1
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.mark.parametrize("flags", [(), ("--digests", "all")], ids=["checksums", "digests"])
def test_a_training_that_was_damaged_is_not_called_finished(tmp_path, capsys, flags):
    case = make(tmp_path)
    if flags:
        assert call(case.source, case.destination, *FLAGS, *flags, "--overwrite") == 0
    assert call(case.source, case.destination, *FLAGS, *flags) == 0
    flip(next(case.destination.glob("optimizer/*.pt")))
    assert call(case.source, case.destination, *FLAGS, *flags) == 4
    assert "was damaged since; --overwrite makes it anew" in capsys.readouterr().err


@pytest.mark.parametrize("damage, names", [
    (flip, "optimizer/*.pt"), (lengthen, "optimizer/*.pt"), (shorten, "optimizer/*.pt"),
    (change_sums, "stream_reshard.journal")])
def test_what_was_damaged_meanwhile_is_written_again(tmp_path, damage, names):
    case = make(tmp_path)
    case.clear()
    case.run(kill(len(case.operations) // 3, False))
    partial = case.destination.with_name(case.destination.name + ".partial")
    paths = list(partial.glob(names))
    assert paths and '"job"' in (partial / "stream_reshard.journal").read_text()
    for path in paths:
        damage(path)
    assert call(case.source, case.destination, *FLAGS[:-4]) == 0
    assert case.tree() == case.wanted


def test_workers_in_processes_write_one_file_together(tmp_path):
    case = make(tmp_path)
    wanted = case.tree()
    case.clear()
    planned = plan_conversion(Options(case.source, case.destination, to="nanotron", tp=2, dp=2, zero=1,
                                      max_memory=2**32))
    with pool() as executor:
        run(planned.output, RunOptions(planned.memory.block_nbytes, executor))
    assert case.tree() == wanted
