"""The trial of the disks: its limits, what it leaves behind, and the estimate that is made of it."""
import errno
import json
import os
import signal
from functools import partial

import pytest
from running import call
from sources import make_source
from trees import write_sparse_source

from stream_reshard import api
from stream_reshard.convert import estimate
from stream_reshard.machine.kernel import io_counters
from stream_reshard.machine.memory import duration
from stream_reshard.run import trial
from stream_reshard.run.trial import Rate, Trial, try_disks
from stream_reshard.storage.source_file import SourceFile

BLOCK = 2**16
NAMES = ("a", "b", "c")


@pytest.fixture
def files(tmp_path):
    """Three files of odd sizes, and an empty folder beside them."""
    (tmp_path / "to").mkdir()
    for number, name in enumerate(NAMES):
        (tmp_path / name).write_bytes(os.urandom(10 * BLOCK + 1000 * number))
    return tmp_path


def tried(root, names=NAMES):
    return try_disks(partial(SourceFile, root), [(name, (root / name).stat().st_size) for name in names], root / "to", BLOCK)


def state(root):
    return {name: ((root / name).read_bytes(), (root / name).stat().st_mtime_ns) for name in NAMES}, os.listdir(root / "to")


def test_all_of_a_small_source_is_moved_and_nothing_is_left(files):
    before = state(files)
    done = tried(files)
    assert done.nbytes == sum((files / name).stat().st_size for name in NAMES)
    assert 0 < done.reading.nbytes < done.copying.nbytes
    assert state(files) == before and before[1] == []


def test_what_is_copied_are_the_bytes_of_the_source(files, monkeypatch):
    """Each stretch once, in order; what is read by itself comes first."""
    copied = {}
    monkeypatch.setattr(trial, "write_all", lambda target, view, offset: copied.update({offset: bytes(view)}))
    done = tried(files)
    whole = b"".join((files / name).read_bytes() for name in NAMES)
    assert b"".join(copied[offset] for offset in sorted(copied)) == whole[done.reading.nbytes:]


@pytest.mark.parametrize("limit", [1, 5 * BLOCK + 1, 20 * BLOCK, 10**9])
def test_bytes_are_limited(files, monkeypatch, limit):
    monkeypatch.setattr(trial, "MAX_NBYTES", limit)
    before, done = io_counters(), tried(files)
    total = sum((files / name).stat().st_size for name in NAMES)
    assert done.nbytes == (2 if limit <= BLOCK else 1) * min(limit, total), "one stretch alone is read, then copied"
    if before:
        assert io_counters(before)["wchar"] <= min(limit, total)


def test_time_is_limited(files, monkeypatch):
    """One block has to be read, and one has to be copied, on the slowest of disks."""
    monkeypatch.setattr(trial, "MAX_SECONDS", 0)
    done = tried(files)
    assert (done.reading.nbytes, done.copying.nbytes) == (BLOCK, BLOCK)


def test_bytes_come_from_the_disk(files):
    """Though the page cache has them all."""
    with open(files / "a", "rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        before = io_counters()
        stream.read()
        if not before or io_counters(before)["read_bytes"] == 0:
            pytest.skip("this file system keeps its files in memory")
    before = io_counters()
    done = tried(files, ["a"])
    assert io_counters(before)["read_bytes"] >= done.nbytes


def test_nothing_is_left_by_a_trial_that_is_killed(files, monkeypatch):
    def write_and_die(target, view, offset):
        os.pwrite(target, view, offset)
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(trial, "write_all", write_and_die)
    if not (pid := os.fork()):
        tried(files)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    assert os.listdir(files / "to") == []


SPEED = Trial(Rate(4 * 10**6, 2.0), Rate(10**6, 1.0))
"""Reads 2 MB/s, copies 1 MB/s."""


def test_the_estimate_counts_what_a_run_moves(tmp_path, monkeypatch):
    """Reads for --verify, no clones, no files that are kept; and it stands among the facts and lines of the plan."""
    monkeypatch.setattr(estimate, "try_disks", lambda *given: SPEED)
    write_sparse_source(tmp_path / "hf", vocab=20_000)
    plain = api.plan(tmp_path / "hf", tmp_path / "nt", tp=2)
    nbytes = plain.plan.nbytes
    assert api.estimate(plain).estimate.seconds == pytest.approx(nbytes / 10**6, rel=1e-3)
    facts = api.estimate(plain).facts["time"]
    assert (facts["read_nbytes_per_second"], facts["copied_nbytes_per_second"], facts["nbytes_tried"]) == (
        2 * 10**6, 10**6, 5 * 10**6)
    assert any(line.startswith("time     about ") for line in api.estimate(plain).lines)
    verified = api.estimate(api.plan(tmp_path / "hf", tmp_path / "nt", tp=2, verify=True)).estimate.seconds
    assert verified == pytest.approx(nbytes * (1 + 2 / 2) / 10**6, rel=1e-3)
    monkeypatch.setattr(estimate, "can_clone_all", lambda *given: True)
    assert api.estimate(plain).estimate.seconds < nbytes / 10**6 / 2


def test_files_that_are_kept_take_no_time(tmp_path, monkeypatch):
    from dataclasses import replace
    monkeypatch.setattr(estimate, "try_disks", lambda *given: SPEED)
    plain = api.plan(make_source(tmp_path / "hf"), tmp_path / "nt", tp=2)
    half = replace(plain, num_kept=plain.plan.target.num_files // 2)
    part = 1 - half.num_kept / plain.plan.target.num_files
    assert api.estimate(half).estimate.seconds == pytest.approx(part * api.estimate(plain).estimate.seconds)


def test_only_the_option_writes(tmp_path, capsys):
    source = make_source(tmp_path / "hf")
    for words, is_estimated in (((tmp_path / "nt",), False), ((tmp_path / "nt", "--time"), True), (("--time",), False)):
        assert call("plan", source, *words, "--json") == 0
        facts = json.loads(capsys.readouterr().out)
        assert (facts["time"] is not None) == is_estimated
        assert any("not estimated: there is no DST" in note for note in facts["notes"]) == (words == ("--time",))
    assert facts["exit_code"] == 0 and os.listdir(tmp_path) == ["hf"]


def test_a_disk_that_takes_nothing_is_named(tmp_path, monkeypatch):
    def refuse(descriptor, nbytes):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(trial, "fallocate", refuse)
    conversion = api.estimate(api.plan(make_source(tmp_path / "hf"), tmp_path / "nt"))
    assert conversion.estimate is None and "nothing can be written beside DST (Disk quota exceeded)" in conversion.notes[-1]


@pytest.mark.parametrize("seconds, text", [(0.2, "less than 1 s"), (1, "about 1 s"), (119.4, "about 119 s"),
                                           (600, "about 10 min"), (7199, "about 120 min"), (9000, "about 2.5 h")])
def test_times_are_for_people(seconds, text):
    assert duration(seconds) == text
