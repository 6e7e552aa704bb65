"""What the machine is, and one state of its memory before every timed run."""
from __future__ import annotations

import datetime
import importlib.metadata
import mmap
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stream_reshard.machine.memory import machine_limit

ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"} | {
    "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
"""For programs that are measured: as an installed one they find their bytecode, which the warm-up leaves."""

_ROOT = Path(__file__).parent.parent
_PACKAGES = ("stream_reshard", "safetensors", "numpy", "torch", "transformers", "mergekit", "deepspeed")
_TOUCHED = 0.8
"""Part of the free memory that is touched before a run."""
_POPULATE_WRITE = 23
"""MADV_POPULATE_WRITE (madvise(2), Linux 5.14), which Python does not name."""


def facts(scratch: Path) -> dict[str, Any]:
    """The machine, for a reader of the results; sizes in bytes."""
    return {"cpu": _field("/proc/cpuinfo", "model name"), "num_cores": len(os.sched_getaffinity(0)),
            "memory_nbytes": available("MemTotal"), "kernel": platform.release(), "file_system": file_system(scratch),
            "python": platform.python_version(), "packages": {name: v for name in _PACKAGES if (v := _version(name))},
            "commit": _commit(), "date": datetime.date.today().isoformat(),
            "caches": "dropped by the kernel" if _can_drop() else "source evicted by posix_fadvise"}


def available(name: str = "MemAvailable") -> int:
    """A line of /proc/meminfo in bytes (proc_meminfo(5))."""
    return int(_field("/proc/meminfo", name).split()[0]) * 1024


def _field(path: str, name: str) -> str:
    for line in Path(path).read_text().splitlines():
        if line.split(":")[0].strip() == name:
            return line.split(":", 1)[1].strip()
    return "unknown"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    """The last commit that changed the package; a plus sign where its files differ from that."""
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=_ROOT, capture_output=True, text=True,
                              check=True).stdout.strip()
    try:
        is_changed = bool(git("status", "--porcelain", "stream_reshard"))
        return git("log", "-1", "--format=%h", "--", "stream_reshard") + "+" * is_changed
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def file_system(folder: Path) -> str:
    """Type of the file system that holds a folder."""
    folder = folder.resolve()
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    holding = [(len(point), kind) for point, kind in mounts if folder.is_relative_to(point)]
    return max(holding, key=lambda pair: pair[0])[1] if holding else "unknown"


def settle(folders: Sequence[Path], is_warm: bool, warm_up: Sequence[str] = ()) -> None:
    """Bring the machine into a known state; what is measured starts at once afterwards.

    Dirty pages are written, caches dropped; `warm_up` is a command that brings the program to be measured back into the
    cache; for a warm run the folders are read. A virtual machine gives freed memory back to its host within seconds and
    pays for each page when it takes it again: most of what is free is touched and freed here, so that the run finds its
    pages there, whichever it gets.
    """
    os.sync()
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    if _can_drop():
        Path("/proc/sys/vm/drop_caches").write_text("3")
    else:
        for path in files:
            _evict(path)
    if warm_up:
        subprocess.run(warm_up, cwd=_ROOT, env=ENVIRONMENT, check=True, stdout=subprocess.DEVNULL)
    if is_warm:
        for path in files:
            _read(path)
    touched = int(min(available("MemFree"), machine_limit()) * _TOUCHED)
    subprocess.run([sys.executable, "-m", "benchmarks.machine", str(touched)], check=True, cwd=_ROOT)


def _can_drop() -> bool:
    return os.access("/proc/sys/vm/drop_caches", os.W_OK)


def _evict(path: Path) -> None:
    with open(path, "rb") as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _read(path: Path) -> None:
    with open(path, "rb", buffering=0) as stream:
        buffer = bytearray(2**22)
        while stream.readinto(buffer):
            pass


def touch(nbytes: int) -> None:
    """Take so much memory, in huge pages where there are any, which needs fewer faults."""
    memory = mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
        memory.madvise(_POPULATE_WRITE)
    except OSError:
        for place in range(0, nbytes, mmap.PAGESIZE):
            memory[place] = 1


if __name__ == "__main__":  # A process of its own: what it touches is free when it ends.
    touch(int(sys.argv[1]))
