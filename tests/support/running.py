"""Ways to run the command: in this process, in a fork whose opens are noted, in a process whose memory is watched."""
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections import namedtuple
from contextlib import contextmanager
from pathlib import Path

import psutil

from stream_reshard.cli import main

ROOT = Path(__file__).parents[2]


def call(*arguments):
    """What the command ends with; argparse raises SystemExit. A test process holds much, and what hangs there hangs."""
    limits = [] if arguments[0] == "inspect" else ["--max-memory", "8GiB"]
    limits += [] if arguments[0] == "inspect" or "--workers" in arguments else ["--workers", "1"]
    try:
        return main([*map(str, arguments), *limits])
    except SystemExit as stop:
        return stop.code


class TooLong(BaseException):
    """No exception that the package could take for its own."""


@contextmanager
def deadline(seconds):
    """Ends what hangs, such as the opening of a pipe that nobody writes to."""
    def handle(number, frame):
        raise TooLong

    before, is_late = signal.signal(signal.SIGALRM, handle), False
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except TooLong:
        is_late = True
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert not is_late, f"not done after {seconds} s"


def measured(*arguments):
    """(exit code, peak of the process tree's summed resident set in bytes, stderr) of a command in its own process."""
    command = [sys.executable, "-m", "stream_reshard", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=ROOT, text=True)
    peak = peak_until_it_ends(process)
    return process.returncode, peak, process.stderr.read()


def peak_until_it_ends(process):
    """Peak of the summed resident set of a process and all below it, in bytes, sampled until it ends. Its children are
    looked for at every tenth sample only: that reads all of /proc, and would take as long as the run."""
    root, tree, peak, number = psutil.Process(process.pid), [], 0, 0
    while process.poll() is None:
        try:
            if number % 10 == 0:
                tree = [root, *root.children(recursive=True)]
            peak = max(peak, sum(p.memory_info().rss for p in tree))
        except psutil.Error:
            tree = [root]
        number += 1
        time.sleep(0.003)
    return peak


STATUS = """import atexit, contextlib, pathlib, sys
def status(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))
"""
WATCHED = STATUS + """atexit.register(lambda: print(status("VmHWM"), file=sys.stderr))
from stream_reshard.cli import script; script()"""
"""Code of a fresh interpreter that says at its end what it held: of one, and of one that is the command."""


def watched(code, *arguments):
    """(exit code, lines of stderr, seconds of a processor, bytes that it says at its end) of a fresh interpreter."""
    before = os.times()
    run = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True)
    *lines, nbytes = run.stderr.splitlines()
    seconds = os.times().children_user + os.times().children_system - before.children_user - before.children_system
    return run.returncode, lines, seconds, int(nbytes)


_OPENED = []


def _note(event, arguments):
    if event == "open" and _OPENED:
        _OPENED.append(os.fsdecode(arguments[0]) if isinstance(arguments[0], (str, bytes)) else "")


@contextmanager
def opened():
    """The absolute paths that are opened meanwhile. An audit hook cannot be taken away: it stays, and notes nothing."""
    if not getattr(opened, "is_hooked", False):
        sys.addaudithook(_note)
        opened.is_hooked = True
    found = []
    _OPENED.append("")
    try:
        yield found
    finally:
        found.extend(os.path.abspath(path) for path in _OPENED if path)
        _OPENED.clear()


SYSTEM = re.compile(r"/proc/(\d+/statm?|self/(status|cgroup|mountinfo|io)|stat|meminfo)"
                    r"|/sys/fs/cgroup/.*memory\.(max|limit_in_bytes)")
"""What a plan may open beside its source: how much memory there is, and is held."""

FOREIGN = {"pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "socket.connect", "import"}
Run = namedtuple("Run", "code out err opened foreign")
"""`foreign`: what ran code of others, or could."""


def in_child(*arguments, seconds=60):
    """A command in a forked process, whose audit hook notes what it opens and could run; what hangs is killed."""
    reading, writing = os.pipe()
    if not (pid := os.fork()):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(seconds)
        os.write(writing, json.dumps(_audited(arguments)).encode())
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as stream:
        told = stream.read()
    assert os.waitpid(pid, 0)[1] == 0, f"killed after {seconds} s"
    return Run(*json.loads(told))


def _audited(arguments):
    events, code = [], "an exception"
    sys.stdout, sys.stderr = streams = [io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in "oe"]
    sys.addaudithook(lambda event, told: events.append((event, told)) if event == "open" or event in FOREIGN else None)
    try:
        code = call(*arguments)
    except BaseException:
        traceback.print_exc()
    opened = [os.path.abspath(os.fsencode(told[0])) for event, told in events
              if event == "open" and type(told[0]) is not int]
    return [code, *(stream.buffer.getvalue().decode() for stream in streams), [os.fsdecode(path) for path in opened],
            [f"{event} {told[:1]}" for event, told in events if event in FOREIGN]]


def outside(run, *roots):
    """What a run opened that is not below these folders, nor the system's word on memory; what it could have run."""
    inside = tuple(f"{root}/" for root in roots)
    return run.foreign + [path for path in run.opened if not path.startswith(inside) and not SYSTEM.fullmatch(path)]


def said(capsys):
    """(stdout, stderr) of a command: not more than a screen, and nothing that a terminal obeys."""
    out, err = capsys.readouterr()
    assert all(line.isprintable() for line in (out + err).split("\n")), (out + err)[:2000]
    assert (out + err).count("\n") <= 52 and len(out + err) < 7000, (out + err)[:2000]
    return out, err
