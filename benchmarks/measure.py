"""Run one command and watch its process tree from outside: wall time, memory over time, bytes moved.

Memory is sampled from /proc/PID/status (proc_pid_status(5)): VmRSS and RssAnon, each summed over the tree; VmHWM of the
first process catches peaks between two samples. Bytes come from /proc/PID/io (proc_pid_io(5)) of the first process once
it has ended and before it is reaped: by then the kernel has added the counters of every child that was waited for, so
that nothing is counted twice.
"""
from __future__ import annotations

import os
import select
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

PERIOD = 0.005
"""Seconds between two samples; one takes about 0.05 ms."""
MAX_POINTS = 200
"""Samples of a run that are kept."""
DISK_PERIOD = 0.2
"""Seconds between two looks at the disk; one takes some milliseconds where there are a thousand files."""


class Sample(NamedTuple):
    """Memory of a process tree at one moment, in bytes."""

    seconds: float
    """Since the start."""
    rss: int
    anon: int
    """The part of `rss` that is no file: it cannot be dropped and read again."""


@dataclass(frozen=True)
class Bytes:
    """What a process tree read and wrote, in bytes."""

    rchar: int = 0
    """By read calls, from disk or cache; mapped reads are not in it."""
    wchar: int = 0
    """By write calls."""
    read_bytes: int = 0
    """Fetched from storage; nothing where the source was cached."""
    write_bytes: int = 0
    """Sent to storage, counted when the page is dirtied; cloned blocks are not in it."""


@dataclass(frozen=True)
class Measurement:
    """One run of one command."""

    exit_code: int
    """Negative: the signal that ended it."""
    seconds: float
    """Wall time of the command, and of the `sync` after it where one was asked for."""
    sync_seconds: float
    """The part of `seconds` that was that `sync`."""
    peak_rss: int
    """Highest resident set of the tree, bytes: the highest sample, or VmHWM where that is more."""
    peak_anon: int
    """Highest sample of the anonymous part, bytes."""
    bytes: Bytes
    peak_disk: int
    """Most bytes of disk that the watched folder held while the command ran; 0 if none was watched."""
    series: tuple[Sample, ...]
    """Memory over time, thinned to `MAX_POINTS`; the highest sample is among them."""
    stdout: str = field(repr=False, default="")
    stderr: str = field(repr=False, default="")


def measure(command: Sequence[str], *, cwd: Path | None = None, env: Mapping[str, str] | None = None,
            sync: bool = False, watched: Path | None = None) -> Measurement:
    """Run a command to its end. `sync` is for commands that leave their output in the cache; `watched` is a folder
    whose size on disk is of interest while the command runs."""
    out, err = (open(os.memfd_create(name), "w+b") for name in ("out", "err"))
    with out, err:
        begin = time.monotonic()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, cwd=cwd, env=env)
        try:
            series, high_water, peak_disk = _watch(process.pid, begin, watched)
            ended = time.monotonic()
            moved = bytes_moved(process.pid)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        end = ended
        if sync and not process.returncode:
            os.sync()
            end = time.monotonic()
        peak_disk = max(peak_disk, disk_nbytes(watched))
        texts = [_text_of(stream) for stream in (out, err)]
    return Measurement(process.returncode, end - begin, end - ended, max(high_water, *(s.rss for s in series)),
                       max(s.anon for s in series), moved, peak_disk, thinned(series), *texts)


def _text_of(stream) -> str:
    stream.seek(0)
    return stream.read().decode(errors="replace")


def _watch(pid: int, begin: float, watched: Path | None) -> tuple[list[Sample], int, int]:
    """Sample until the process has ended, leaving it to be reaped: (samples, VmHWM of the process, most bytes of disk
    that the folder held)."""
    descriptor = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    series, high_water, peak_disk, looked = [Sample(0.0, 0, 0)], 0, 0, begin
    try:
        while True:
            statuses = [status_of(one) for one in tree_of(pid)]
            high_water = max(high_water, statuses[0].get("VmHWM", 0))
            rss, anon = (sum(status.get(name, 0) for status in statuses) for name in ("VmRSS", "RssAnon"))
            if rss:
                series.append(Sample(time.monotonic() - begin, rss, anon))
            if time.monotonic() - looked > DISK_PERIOD:
                peak_disk, looked = max(peak_disk, disk_nbytes(watched)), time.monotonic()
            if poll.poll(PERIOD * 1000):
                return series, high_water, peak_disk
    finally:
        os.close(descriptor)


def disk_nbytes(folder: Path | None) -> int:
    """Bytes of disk that the files below a folder take; some of them may go while they are counted."""
    nbytes = 0
    for parent, _, names in os.walk(folder) if folder else ():
        for name in names:
            with suppress(FileNotFoundError):
                nbytes += os.lstat(os.path.join(parent, name)).st_blocks * 512
    return nbytes


def tree_of(pid: int) -> list[int]:
    """A process and all below it, itself first."""
    found = [pid]
    for parent in found:
        try:
            for thread in os.listdir(f"/proc/{parent}/task"):
                found += map(int, Path(f"/proc/{parent}/task/{thread}/children").read_text().split())
        except OSError:
            continue
    return found


def status_of(pid: int) -> dict[str, int]:
    """The sizes in /proc/PID/status, in bytes; none of them once the process has ended."""
    try:
        with open(f"/proc/{pid}/status", "rb", buffering=0) as stream:
            lines = stream.read().decode().splitlines()
    except OSError:
        return {}
    return {line[:line.index(":")]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}


def bytes_moved(pid: int) -> Bytes:
    """Counters of a process, those of its children that were waited for included."""
    try:
        lines = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
    except OSError:
        return Bytes()
    return Bytes(*(int(lines[name]) for name in ("rchar", "wchar", "read_bytes", "write_bytes")))


def thinned(series: Sequence[Sample], most: int = MAX_POINTS) -> tuple[Sample, ...]:
    """At most so many samples, spread evenly, each the highest of its neighbourhood."""
    step = -(-len(series) // most)
    return tuple(max(series[i:i + step], key=lambda sample: sample.rss) for i in range(0, len(series), step))
