"""Faults of the machine, at every call that changes the disk: the destination is absent, or whole and right.

After each, the same command ends what was begun, with the bytes of an undisturbed run. Small samples run by default,
all points with `-m heavy`.
"""
import errno
import os
import random
import signal
import time

import pytest
from faults import FLAGS, Case, after_fault, campaign, clean_error, fail, kill, tree_of

from stream_reshard.cli import main

QUICK = pytest.param(10, id="sample")
HEAVY = pytest.param(10**9, id="all", marks=pytest.mark.heavy)


def make(root):
    return Case(root)


def sample(points, number):
    """All points, or a seeded part of them."""
    points = list(points)
    return points if number >= len(points) else random.Random(7).sample(points, number)


def killed(case, point):
    case.clear()
    code, err = case.run(kill(*point))
    return f"not killed: {code} {err}" if code != -signal.SIGKILL else after_fault(case)


@pytest.mark.parametrize("number", [QUICK, HEAVY])
def test_sigkill_before_and_after_every_call(quick_path, figures, number):
    count = len(Case(quick_path / "count").operations)
    assert count > 150
    points = [(at, after) for at in range(1, count + 1) for after in (False, True)]
    figures("SIGKILL at enumerated calls", *campaign(quick_path, make, killed, sample(points, number)))


def killed_at_random(case, seed):
    case.clear()
    pid = case.start(flags=("--workers", "2"))
    time.sleep(random.Random(seed).uniform(0, 1.1) * case.seconds)
    os.kill(pid, signal.SIGKILL)
    case.wait(pid)
    return after_fault(case)


def make_timed(root):
    case = Case(root)
    begin = time.monotonic()
    case.clear()
    case.run(flags=("--workers", "2"))
    case.seconds = time.monotonic() - begin
    return case


@pytest.mark.parametrize("number", [QUICK, pytest.param(1000, id="all", marks=pytest.mark.heavy)])
def test_sigkill_at_random_times(quick_path, figures, number):
    figures("SIGKILL at random times", *campaign(quick_path, make_timed, killed_at_random, range(number)))


def make_overwriting(root):
    """An older checkpoint of another topology stands at the destination."""
    def before(case):
        assert main([str(case.source), str(case.destination), "--quiet", "--max-memory", "4GiB"]) == 0
        case.old = tree_of(case.destination)

    return Case(root, (*FLAGS, "--overwrite"), before=before)


def make_restarting(root):
    """A run of another plan was stopped halfway, and is thrown away."""
    def before(case):
        case.old = None
        if case.flags[-1] == "--restart":
            other = Case.__new__(Case)
            other.__dict__ |= case.__dict__ | {"flags": [*FLAGS, "--tp", "1"]}
            other.run(kill(60, False))

    return Case(root, (*FLAGS, "--restart"), before=before)


def make_replacing_a_damaged_one(root):
    """What stands there is of the same plan, but a bit of it has rotted: only by the folder are the two told apart."""
    def before(case):
        assert main([str(case.source), str(case.destination), *FLAGS]) == 0
        path = next(case.destination.rglob("*o_proj/*tp-rank-1*"))
        path.write_bytes(path.read_bytes()[:-1] + b"!")
        case.old = tree_of(case.destination)

    return Case(root, (*FLAGS, "--overwrite", "--verify"), before=before)


def killed_overwriting(case, point):
    case.clear()
    code, err = case.run(kill(*point))
    return f"not killed: {code} {err}" if code != -signal.SIGKILL else after_fault(case, [case.old])


def killed_restarting(case, point):
    case.clear()
    code, err = case.run(kill(*point))
    return f"not killed: {code} {err}" if code != -signal.SIGKILL else after_fault(case)


@pytest.mark.heavy
def test_sigkill_while_restarting(quick_path, figures):
    """Whatever of the old attempt is left, the same command goes on."""
    (quick_path / "count").mkdir()
    names = make_restarting(quick_path / "count").operations
    points = [(at, after) for at in range(1, 60) for after in (False, True)]
    assert "rename" in names[:10]
    figures("SIGKILL, restarting", *campaign(quick_path, make_restarting, killed_restarting, points))


@pytest.mark.parametrize("number", [pytest.param(4, id="sample"), HEAVY])
@pytest.mark.parametrize("make_old", [make_overwriting, make_replacing_a_damaged_one])
def test_sigkill_while_overwriting(quick_path, figures, make_old, number):
    """The old checkpoint, or the new one, but always a whole one; and only the last part of the run differs."""
    (quick_path / "count").mkdir()
    count = len(make_old(quick_path / "count").operations)
    points = [(at, after) for at in range(max(1, count - 150), count + 1) for after in (False, True)]
    figures(f"SIGKILL, {make_old.__name__[5:]}", *campaign(quick_path, make_old, killed_overwriting,
                                                           sample(points, number)))


def failed(case, point):
    at, code, until = point
    case.clear()
    ended, err = case.run(fail(at, code, until))
    wrong = clean_error(ended, err, (0, 4, 6))
    left = [name for name in case.beside() if name.endswith(".part")]
    return wrong or (f"left {left}" if left else None) or after_fault(case)


CODES = {"open": (errno.ENOSPC, errno.EIO, errno.EMFILE), "mkdir": (errno.ENOSPC, errno.EDQUOT),
         "fallocate": (errno.ENOSPC, errno.EFBIG), "pwritev": (errno.ENOSPC, errno.EIO, errno.EFBIG, errno.EDQUOT),
         "pwrite": (errno.ENOSPC, errno.EIO), "ftruncate": (errno.EIO,), "fsync": (errno.EIO, errno.ENOSPC),
         "close": (errno.EIO,), "rename": (errno.EIO, errno.ENOSPC), "unlink": (errno.EIO,), "rmdir": ()}
"""What each call can fail with, in real life."""


@pytest.mark.parametrize("number", [QUICK, HEAVY])
def test_errors_of_every_call(quick_path, figures, number):
    """Once with each of its codes; and with one of them again and again from there on."""
    names = list(enumerate(Case(quick_path / "count").operations, 1))
    points = [(at, code, None) for at, name in names for code in CODES[name]]
    points += [(at, CODES[name][at % len(CODES[name])], 10**9) for at, name in names if CODES[name]]
    figures("errors of enumerated calls", *campaign(quick_path, make, failed, sample(points, number)))


def shortened(case, point):
    """Every gathered and plain write stops early: at a part of its bytes that the point chooses."""
    def prepare():
        real = {name: getattr(os, name) for name in ("pwritev", "pwrite")}

        def pwritev(descriptor, pieces, offset):
            whole = b"".join(pieces)
            return real["pwritev"](descriptor, [whole[:max(1, len(whole) * point // 100)]], offset)

        def pwrite(descriptor, content, offset):
            return real["pwrite"](descriptor, bytes(content)[:max(1, len(content) * point // 100)], offset)
        os.pwritev, os.pwrite = pwritev, pwrite

    case.clear()
    code, err = case.run(prepare=prepare)
    return clean_error(code, err, (0,)) or after_fault(case)


def test_short_writes(quick_path, figures):
    figures("runs of short writes only", *campaign(quick_path, make, shortened, range(1, 100, 14)))


SIGNALS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129, signal.SIGUSR1: 138}


def signalled(case, point):
    number, at = point

    def act(count, name, call):
        done = call()
        if count == at:
            os.kill(os.getpid(), number)
        return done

    case.clear()
    begin = time.monotonic()
    code, err = case.run(act)
    seconds = time.monotonic() - begin
    if code == 0:  # It came when all was done but for the lock.
        return after_fault(case) if case.tree() == case.wanted else "ended well without a result"
    if code != SIGNALS[number] or "Traceback" in err or seconds > 5:
        return f"code {code} after {seconds:.1f} s: {err}"
    if f"to go on: python -m stream_reshard {case.source} {case.destination}" not in err:
        return f"no resume command: {err}"
    temps = [str(path) for path in case.destination.parent.rglob(".*.part")]
    return f"left {temps}" if temps or any("lock" in name for name in case.beside()) else after_fault(case)


@pytest.mark.parametrize("number", [pytest.param(8, id="sample"), pytest.param(200, id="all",
                                                                               marks=pytest.mark.heavy)])
def test_signals_stop_cleanly(quick_path, figures, number):
    count = len(Case(quick_path / "count").operations)
    chooser = random.Random(3)
    points = [(kind, chooser.randint(2, count)) for kind in SIGNALS for _ in range(number // len(SIGNALS))]
    figures("signals", *campaign(quick_path, make, signalled, points))
