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

from stream_reshard import lock
from stream_reshard.cli import main
from stream_reshard.errors import DestinationError, LockedError
from stream_reshard.lock import Lock
from stream_reshard.staging import lock_of

HERE = {"pid": 2**22 - 1, "host": socket.gethostname(), "boot": lock._boot(), "since": "2024-01-01 00:00:00 +0000"}
"""What a run of this machine that is dead has left; no process has this number."""


@pytest.mark.parametrize("left", [b"", bytes(100), b'{"pi', b'{"pid": 17, "ho', json.dumps(HERE).encode(),
                                  json.dumps(HERE | {"boot": "before", "pid": os.getpid()}).encode()],
                         ids=["empty", "zeros", "torn", "torn later", "dead", "of another boot"])
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
