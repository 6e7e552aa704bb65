"""One run at a time writes to a destination: who holds the lock is named, the dead are told from the living."""
import errno
import fcntl
import json
import os
import socket
import time
from multiprocessing import get_context

import pytest
from faults import Case, after_fault, until

from stream_reshard.cli import main
from stream_reshard.destination import lock
from stream_reshard.destination.lock import Lock
from stream_reshard.destination.staging import lock_of
from stream_reshard.errors import DestinationError, LockedError

HERE = {"pid": 2**22 - 1, "host": socket.gethostname(), "boot": lock._boot(), "since": "2024-01-01 00:00:00 +0000"}
"""What a run of this machine that is dead has left; no process has this number."""


MIXED = b'{"pid": 17, "started": 5, "ho' + json.dumps(HERE).encode()[29:].ljust(1024 - 29)
"""A record over half of an older one, as a reader may see it while its run writes."""


@pytest.mark.parametrize("left", [b"", bytes(100), b'{"pi', b'{"pid": 17, "ho', MIXED, json.dumps(HERE).encode(),
                                  json.dumps(HERE | {"boot": "before", "pid": os.getpid()}).encode()],
                         ids=["empty", "zeros", "torn", "torn later", "half of each of two", "dead", "of another boot"])
def test_a_stale_lock_is_taken(tmp_path, left):
    (tmp_path / "lock").write_bytes(left)
    with Lock(tmp_path / "lock"):
        said = json.loads((tmp_path / "lock").read_bytes())
        assert said["pid"] == os.getpid() and said["host"] == socket.gethostname()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("left", [b"nonsense", b"[]", b'{"pid": "1"}', b"[" * 4000, b"{}"])
def test_a_file_that_no_run_has_written_is_neither_taken_nor_removed(tmp_path, left):
    (tmp_path / "lock").write_bytes(left)
    for break_lock in (False, True):
        with pytest.raises(DestinationError, match="is not a lock of this tool"):
            Lock(tmp_path / "lock", break_lock).__enter__()
    assert (tmp_path / "lock").read_bytes() == left


FOREIGN = HERE | {"host": "node\x1b[31m7", "boot": "elsewhere"}


def test_a_lock_of_another_machine_is_respected_until_a_person_breaks_it(tmp_path):
    (tmp_path / "lock").write_text(json.dumps(FOREIGN))
    with pytest.raises(LockedError, match="process 4194303 on 'node.x1b.31m7' since '2024.*--break-lock") as refusal:
        Lock(tmp_path / "lock").__enter__()
    assert str(refusal.value).isprintable()
    assert json.loads((tmp_path / "lock").read_text()) == FOREIGN
    with Lock(tmp_path / "lock", break_lock=True):
        pass
    assert not list(tmp_path.iterdir())


THIS = HERE | {"pids": lock._namespace(), "token": "other"}
"""What a run of this version leaves."""

RULES = [
    ("alive", {"pid": os.getppid(), "started": lock._started(os.getppid())}, "ext4", False),
    ("alive, on FUSE", {"pid": os.getppid(), "started": lock._started(os.getppid())}, "fuse.bindfs", False),
    ("its number belongs to a later process", {"pid": os.getppid(), "started": 1}, "ext4", True),
    ("the same, on FUSE", {"pid": os.getppid(), "started": 1}, "fuse", True),
    ("dead", {"started": 5}, "nfs4", True),
    ("another namespace", {"pids": "pid:[1]", "pid": os.getppid()}, "ext4", True),
    ("another namespace, overlay", {"pids": "pid:[1]"}, "overlay", True),
    ("another namespace, on NFS", {"pids": "pid:[1]"}, "nfs4", False),
    ("another namespace, on FUSE", {"pids": "pid:[1]"}, "fuse.sshfs", False),
    ("another namespace, on a disk by FUSE", {"pids": "pid:[1]"}, "fuseblk", False),
    ("another namespace, nobody knows where", {"pids": "pid:[1]"}, "unknown", False),
    ("no boot id there", {"boot": ""}, "ext4", False),
    ("this process, by another lock", {"pid": os.getpid()}, "ext4", True),
    ("written before namespaces were noted, alive", {"pid": os.getppid(), "pids": ..., "token": ...}, "ext4", False),
    ("written before namespaces were noted, dead", {"pids": ..., "token": ...}, "ext4", True)]


@pytest.mark.parametrize("changes, kind, taken", [pytest.param(*row[1:], id=row[0]) for row in RULES])
def test_who_is_held_for_alive(tmp_path, monkeypatch, changes, kind, taken):
    """The kernel's lock is free in all of these."""
    monkeypatch.setattr(lock, "file_system_of", lambda path: kind)
    left = {key: value for key, value in (THIS | changes).items() if value is not ...}
    (tmp_path / "lock").write_text(json.dumps(left).ljust(1024))
    if taken:
        with Lock(tmp_path / "lock"):
            pass
        assert not (tmp_path / "lock").exists()
        return
    with pytest.raises(LockedError, match=f"process {left['pid']} on"):
        Lock(tmp_path / "lock").__enter__()
    assert json.loads((tmp_path / "lock").read_text()) == left


def test_two_hosts_without_a_boot_id_are_not_one(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_boot", lambda: "")
    (tmp_path / "lock").write_text(json.dumps(THIS | {"boot": ""}))
    with pytest.raises(LockedError, match="--break-lock"):
        Lock(tmp_path / "lock").__enter__()
    with Lock(tmp_path / "lock", break_lock=True):
        pass


def test_the_dead_whom_nobody_buried_are_dead(tmp_path):
    """A process that was killed keeps its number until its parent asks for it; in containers often for ever."""
    if not (pid := os.fork()):
        os._exit(0)
    assert until(lambda: lock._started(pid) == 0)
    (tmp_path / "lock").write_text(json.dumps(THIS | {"pid": pid, "started": 7}))
    with Lock(tmp_path / "lock"):
        pass
    os.waitpid(pid, 0)


LOSSES = {
    "removed": lambda path: path.unlink(),
    "another file": lambda path: (path.unlink(), path.write_text(json.dumps(FOREIGN))),
    "another run in the same file": lambda path: path.write_text(json.dumps(FOREIGN)),
    "emptied": lambda path: os.truncate(path, 0),
    "nonsense": lambda path: path.write_text("nonsense"),
    "a link": lambda path: (path.rename(path.with_name("moved")), path.symlink_to("moved"))}


@pytest.mark.parametrize("lose", LOSSES.values(), ids=LOSSES.keys())
def test_a_lock_that_is_lost_is_noticed_and_left_alone(tmp_path, lose):
    with Lock(tmp_path / "lock") as held:
        held.confirm()
        lose(tmp_path / "lock")
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        with pytest.raises(LockedError, match="this run has lost its lock( to process 4194303|, which somebody)"):
            held.confirm()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("break_lock", [False, True])
def test_the_living_are_never_robbed(tmp_path, break_lock):
    with Lock(tmp_path / "lock"):
        with pytest.raises(LockedError, match=f"process {os.getpid()} on .* since .*; wait for it"):
            Lock(tmp_path / "lock", break_lock).__enter__()
        assert (tmp_path / "lock").exists()


@pytest.mark.parametrize("left, taken", [(None, True), (HERE, True), (HERE | {"pid": os.getpid()}, False),
                                         (FOREIGN, False), ("", False)])
def test_where_the_file_system_knows_no_locks(tmp_path, monkeypatch, left, taken):
    """Only the number of a process on this machine tells there; an empty file may be of a run that just begins."""
    def no_locks(descriptor, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    if left is not None:
        (tmp_path / "lock").write_text(json.dumps(left) if left else "")
    if taken:
        with Lock(tmp_path / "lock"):
            pass
    else:
        with pytest.raises(LockedError):
            Lock(tmp_path / "lock").__enter__()


def test_a_record_that_is_just_written_over_an_older_one_is_of_a_run_that_lives(tmp_path):
    with open(tmp_path / "lock", "wb", buffering=0) as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        other.write(MIXED)
        with pytest.raises(LockedError, match="a process that has not written its name yet; wait for it"):
            Lock(tmp_path / "lock").__enter__()
    assert (tmp_path / "lock").read_bytes() == MIXED


def test_nothing_is_written_through_a_link(tmp_path):
    (tmp_path / "victim").write_text("kept")
    (tmp_path / "lock").symlink_to("victim")
    with pytest.raises(Exception, match="Too many levels of symbolic links"):
        Lock(tmp_path / "lock").__enter__()
    assert (tmp_path / "victim").read_text() == "kept"


def _race(folder):
    """Number of times that this process found itself not alone inside the lock."""
    alone, ends = folder / "inside", time.monotonic() + 20
    wrong = entered = 0
    while entered < 200 and time.monotonic() < ends:
        try:
            held = Lock(folder / "lock").__enter__()
        except LockedError:
            continue
        entered += 1
        try:
            os.close(os.open(alone, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            wrong += 1
        alone.unlink(missing_ok=True)
        if entered % 3 == 0:  # As after a kill.
            os.pwrite(held._descriptor, json.dumps(HERE).encode().ljust(lock._RECORD_NBYTES), 0)
        held.__exit__(None, None, None)
    return entered, wrong


def test_races(tmp_path, figures):
    with get_context("fork").Pool(3) as pool:
        found = pool.map(_race, [tmp_path] * 3)
    assert all(entered == 200 for entered, _ in found), found
    figures("entries into a contended lock", sum(entered for entered, _ in found),
            [wrong for _, wrong in found if wrong])


def test_the_second_run_ends_with_7_and_the_first_goes_on(tmp_path):
    case = Case(tmp_path)
    case.clear()

    def pause(number, name, call):
        while number == 100 and not (tmp_path / "go").exists():
            time.sleep(0.01)
        return call()

    first = case.start(pause)
    first_pipe = case.pipe
    assert until(lambda: lock_of(case.destination).exists() and lock_of(case.destination).stat().st_size)
    for flags in ((), ("--restart",), ("--overwrite",), ("--break-lock",)):
        code, err = case.run(flags=flags)
        assert code == 7 and err.count("\n") == 1, err
        assert f"process {first} on '{socket.gethostname()}' since '2" in err and "wait for it" in err
    (tmp_path / "go").touch()
    case.pipe = first_pipe
    assert case.wait(first)[0] == 0
    assert after_fault(case) is None and case.tree() == case.wanted


def test_a_foreign_lock_at_the_command_line(tmp_path, capsys):
    case = Case(tmp_path)
    case.clear()
    lock_of(case.destination).write_text(json.dumps(FOREIGN))
    command = [str(case.source), str(case.destination), *case.flags]
    assert main(command) == 7
    assert "--break-lock" in capsys.readouterr().err and case.tree() is None
    assert main([*command, "--break-lock"]) == 0
    assert case.tree() == case.wanted and case.beside() == []
