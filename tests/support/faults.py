"""A harness that breaks a run: it kills, fails or cuts short any single call by which the package changes the disk.

A run is a forked child that calls the command line, so that a fault costs 50 ms and not a start of Python. The calls
that change the disk are counted from the first on; a fault is chosen by its number.
"""
import errno
import hashlib
import json
import os
import shutil
import signal
import sys
import time
import traceback
from multiprocessing import get_context
from pathlib import Path

from sources import make_source

from stream_reshard.cli import main
from stream_reshard.convert import room
from stream_reshard.destination import staging
from stream_reshard.formats.nanotron.config import MODEL_CONFIG_NAME
from stream_reshard.storage import durable

OPERATIONS = ("open", "mkdir", "pwritev", "pwrite", "ftruncate", "fsync", "close", "rename",
              "unlink", "rmdir")
"""Functions of `os` that change the disk, or make a change durable."""

FLAGS = ("--tp", "2", "--pp", "2", "--quiet", "--workers", "1", "--max-memory", "4GiB")


class Faults:
    """Counts the calls that change the disk; `act(number, name, call)` decides what becomes of each."""

    def __init__(self, destination, act):
        self.destination, self.act, self.number = destination, act, 0
        self._ours = set()
        for name in OPERATIONS:
            setattr(os, name, self._wrapped(name, getattr(os, name)))
        staging.exchange = self._wrapped("exchange", durable.exchange)
        durable.fallocate = self._wrapped("fallocate", durable.fallocate)

    def _wrapped(self, name, real):
        def call(*args, **kwargs):
            if not self._changes_the_disk(name, args, kwargs):
                return real(*args, **kwargs)
            self.number += 1
            done = self.act(self.number, name, lambda: real(*args, **kwargs))
            if name == "open":
                self._ours.add(done)
            elif name == "close":
                self._ours.discard(args[0])
            return done
        return call

    def _changes_the_disk(self, name, args, kwargs):
        if isinstance(args[0], int):
            return args[0] in self._ours
        below = {kwargs[word] for word in ("dir_fd", "src_dir_fd") if kwargs.get(word) is not None}
        if below:
            return below <= self._ours and (name != "open" or bool(args[1] & (os.O_CREAT | os.O_DIRECTORY)))
        is_ours = (str(args[0]).startswith(str(self.destination))
                   or Path(args[0]) in (self.destination.parent, self.destination.parent.parent))
        if name == "open":
            return is_ours and bool(args[1] & (os.O_CREAT | os.O_DIRECTORY))
        return is_ours or name == "rmdir"


def plain(number, name, call):
    """No fault."""
    return call()


def kill(at, after):
    """SIGKILL before or after a call."""
    def act(number, name, call):
        if number == at and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            return call()
        finally:
            if number == at:
                os.kill(os.getpid(), signal.SIGKILL)
    return act


def fail(at, code, until=None):
    """An error in place of a call, and in place of all like it up to number `until`."""
    seen = []

    def act(number, name, call):
        if number == at:
            seen.append(name)
        if at <= number <= (until or at) and name in seen:
            raise OSError(code, os.strerror(code))
        return call()
    return act


class Case:
    """A source and the destination that it is to become, in a folder of their own."""

    def __init__(self, root, flags=FLAGS, destination=None, before=None):
        """`before` prepares the destination anew for each attempt."""
        self.root, self.flags, self.before = Path(root), list(flags), before
        self.source, self.destination = self.root / "hf", Path(destination or self.root / "nt")
        if not self.source.exists():
            make_source(self.source, num_shards=2, config={"vocab_size": 13})
            (self.source / "tokenizer.json").write_text("{}" * 50)
        self.clear()
        code, err = self.run(lambda number, name, call: self._noted(name, call))
        assert code == 0, err
        self.wanted = self.tree()
        self.operations = (self.root / "events").read_text().split()  # Calls of an undisturbed run, in their order.

    def _noted(self, name, call):
        with open(self.root / "events", "a") as stream:
            stream.write(name + "\n")
        return call()

    def clear(self):
        """Nothing at the destination, and nothing beside it."""
        (self.root / "events").unlink(missing_ok=True)
        for name in [self.destination.name, *self.beside()]:
            path = self.destination.with_name(name)
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        if self.before:
            self.before(self)

    def start(self, act=plain, prepare=lambda: None, flags=()):
        """The pid of a child that does the run with this fault."""
        sys.stdout.flush()
        self.pipe, out = os.pipe()
        if pid := os.fork():
            os.close(out)
            return pid
        code = 99
        try:
            os.dup2(out, 1)
            os.dup2(out, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            if "2" not in flags:
                room.NUM_WAITING = 0  # One job at a time: the calls come in one order, and are as many each time.
            prepare()
            Faults(self.destination, act)
            code = main([str(self.source), str(self.destination), *self.flags, *flags])
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def wait(self, pid):
        """(exit code or minus the signal, what was printed)."""
        with open(self.pipe) as stream:
            printed = stream.read()
        _, status = os.waitpid(pid, 0)
        return os.waitstatus_to_exitcode(status), printed

    def run(self, act=plain, prepare=lambda: None, flags=()):
        """Run to the end with this fault."""
        return self.wait(self.start(act, prepare, flags))

    def tree(self):
        """Digest of every file of the destination; None where there is none."""
        return tree_of(self.destination)

    def beside(self):
        """Names that stand beside the destination and belong to it."""
        if not self.destination.parent.exists():
            return []
        return sorted(path.name for path in self.destination.parent.iterdir()
                      if path.name.startswith((self.destination.name + ".", f".{self.destination.name}.")))


def tree_of(root):
    """Digest of every file below a folder, links not followed; None where it is absent."""
    if not root.exists():
        return None
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in root.rglob("*") if path.is_file() or path.is_symlink()}


def after_fault(case, allowed=(None,)):
    """What is wrong after a fault: the invariant, then what the same command makes of it. None where all is well.

    `allowed` are the trees that may stand at the destination beside the wanted one; None is no tree.
    """
    tree, partial = case.tree(), tree_of(staging.staging_of(case.destination))
    if partial and MODEL_CONFIG_NAME in partial and not case.wanted.items() <= partial.items() and partial not in allowed:
        return "the staging folder holds the marker of a whole checkpoint, and is none"
    if tree != case.wanted and tree not in allowed:
        differ = [path for path in tree if tree[path] != case.wanted.get(path)]
        return f"the destination holds {len(tree)} files, of {len(case.wanted)}; these differ: {differ[:5]}"
    code, err = case.run()
    if code != 0:
        return f"the same command ends with {code}: {err}"
    if case.tree() != case.wanted:
        return "the same command gives another result"
    return f"left beside it: {case.beside()}" if case.beside() else None


def clean_error(code, err, expected):
    """What is wrong with the end of a run that met an error: its code, its text. None where all is well."""
    if code not in expected:
        return f"exit code {code}: {err}"
    if "Traceback" in err or (code and not err.startswith("error: ")):
        return f"no clear error: {err}"
    return None


_task = {}
"""What the processes of a campaign do; they are forked with it."""


def _one(point):
    folder = Path(_task["root"]) / str(os.getpid())
    if folder not in _task:
        folder.mkdir(parents=True, exist_ok=True)
        _task[folder] = _task["make"](folder)
    try:
        return _task["check"](_task[folder], point)
    except BaseException as error:
        return f"{type(error).__name__}: {error}"


def campaign(root, make, check, points, processes=2):
    """(number of points, violations): `check(case, point)` of every point, in processes with a case of their own.

    `check` returns what is wrong, or None.
    """
    points = list(points)
    _task.update(root=root, make=make, check=check)
    with get_context("fork").Pool(processes) as pool:
        found = pool.map(_one, points, chunksize=5)
    wrong = [f"{point}: {text}" for point, text in zip(points, found) if text]
    return len(points), wrong


def manifest_of(root):
    """The manifest of a folder, as JSON."""
    return json.loads((root / "stream_reshard.json").read_text())


def until(condition, seconds=10):
    """Wait for a condition; whether it came true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.002)
    return False


SPACE, FAULT = errno.ENOSPC, errno.EIO
