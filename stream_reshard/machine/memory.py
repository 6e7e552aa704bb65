"""Memory: parse a limit, the limit of the machine, the resident set now, the projected peak of a run. All in bytes.

*allowed* is the limit on the peak resident set of the whole process tree, *reserved* is its resident set before the
work starts (measured), *projected* is the peak that the work will reach. Words and idea are those of the cubed project.
"""
from __future__ import annotations

import ctypes
import mmap
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from stream_reshard.errors import ResourceError, UsageError, quoted
from stream_reshard.machine.kernel import free_descriptors, group_limit, num_cores

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
          "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
"""Bytes of a unit; one letter alone is a binary unit, as for containers and services."""

DEFAULT_ALLOWED = 512 * 2**20
MAX_BLOCK_NBYTES = 2 * 2**20
MIN_BLOCK_NBYTES = 64 * 2**10

VERIFY_BUFFERS = 2
"""Buffers of one worker of a comparison."""

VERIFY_NBYTES = 3 * 2**20
"""Memory of `--verify` at the end of a run, beside its buffers: modules imported late, records of the source."""

_MANY_WORKERS_NBYTES = 2**28
_MAX_DEFAULT_WORKERS = 8

_PER_WORKER = 2 * 2**20
"""Memory of one worker, beside its buffers: its stack, lists of pieces."""
_SLACK = 6 * 2**20
"""Memory of a run, beside that of its workers: the journal, the manifest, modules imported late."""
_NUMPY_NBYTES = 16 * 2**20
"""Memory that importing numpy adds."""
_NUMPY_SPACE_NBYTES, _BLAS_THREAD_NBYTES = 2**26, 2**25
"""Address space that importing numpy takes: in all, and for each core. Hardly any of it becomes resident."""
_NUM_DESCRIPTORS = 8
"""Files that any command has open at once: configs, a header, folders that are listed, modules being imported."""
_PER_FILE = 2048
"""Memory for one target file: its records, and its entry in the manifest."""
_PLAN_NBYTES = 5 * 2**20
"""Memory of headers and index: a few bytes per tensor."""
_PARSED_PER_BYTE = 56
"""Memory for parsing one byte of JSON, at most. Worst case: nested empty lists in a text with one wide character."""


def parse_nbytes(text: str) -> int:
    """ "512MiB", "64 mb", "1G" or "1e9" in bytes. Raises UsageError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e\d{1,2})?)\s*([a-zA-Z]*)\s*", text, re.IGNORECASE)
    if not match or len(text) > 40 or match[2].lower() not in _UNITS or not float(match[1]):
        raise UsageError(f"{quoted(text)} is not a size; write it as 512MiB, 1G, 5GB or 1e9")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def counted(number: int, noun: str) -> str:
    """ "1 file", "2 files". """
    return f"{number} {noun}{'' if number == 1 else 's'}"


def big(number: int) -> str:
    """A count for people: 4.9 M, 6.7 B."""
    return f"{number / 1e9:.1f} B" if number >= 10**9 else f"{number / 1e6:.1f} M" if number >= 10**5 else str(number)


def human(nbytes: float) -> str:
    """A size for people, in binary units, such as 1.5 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} TiB"


def duration(seconds: float) -> str:
    """A time for people, such as "about 12 s"."""
    if seconds < 1:
        return "less than 1 s"
    for unit, length, most in (("s", 1, 120), ("min", 60, 7200)):
        if seconds < most:
            return f"about {seconds / length:.0f} {unit}"
    return f"about {seconds / 3600:.1f} h"


def _check_address_space() -> None:
    """Raises MemoryError where the address space is too small for numpy, which safetensors imports: the BLAS of numpy
    would end the process without a Python error."""
    if "numpy" in sys.modules or resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY:
        return
    try:
        mmap.mmap(-1, _NUMPY_SPACE_NBYTES + num_cores() * _BLAS_THREAD_NBYTES, mmap.MAP_PRIVATE).close()
    except OSError as error:
        raise MemoryError from error


def _check_descriptors() -> None:
    """Raises ResourceError where fewer files can be opened than any command needs."""
    if (num_free := free_descriptors()) < _NUM_DESCRIPTORS:
        raise ResourceError(f"{num_free} more files can be opened at once, and at least {_NUM_DESCRIPTORS} are needed; "
                            f"raise the limit (ulimit -n)")


@contextmanager
def granted() -> Iterator[None]:
    """A context that turns MemoryError and a refused thread into ResourceError: limits of the shell or of a control
    group may be smaller than the plan assumes. Raises ResourceError at once where too few files can be opened."""
    try:
        _check_address_space()
        _check_descriptors()
        yield
    except MemoryError as error:
        raise ResourceError("the system refuses more memory; raise the limit of this process (ulimit -v), or lower "
                            "--workers or --max-memory") from error
    except RuntimeError as error:
        if str(error) != "can't start new thread":
            raise
        raise ResourceError("the system refuses another thread; raise the limit on processes (ulimit -u) or on memory "
                            "(ulimit -v), or lower --workers") from error


def resident() -> int:
    """Current resident set of the process tree."""
    import psutil
    process = psutil.Process()
    return sum(int(one.memory_info().rss) for one in (process, *process.children(recursive=True)))


def held() -> int:
    """Resident set of the process tree, once memory that was freed has gone back to the kernel (malloc_trim(3))."""
    with suppress(AttributeError, OSError):  # Other C libraries have no such call.
        ctypes.CDLL(None).malloc_trim(0)
    return resident()


def peak_resident() -> int:
    """Highest resident set of this process so far (VmHWM; ru_maxrss would include that of the parent)."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def machine_limit() -> int:
    """Memory of the machine, or the limit of the control group of this process if that is lower."""
    import psutil
    total, group = int(psutil.virtual_memory().total), group_limit()
    return total if group is None else min(total, group)


def default_workers(allowed: int, num_cores: int) -> int:
    """Number of workers without --workers; these were the fastest. One worker keeps two cores busy, and a disk is
    fastest with one stream in order; several help on machines with many cores, which usually have several disks."""
    return 1 if allowed < _MANY_WORKERS_NBYTES else min(max(1, num_cores // 8), _MAX_DEFAULT_WORKERS)


@dataclass(frozen=True)
class MemoryPlan:
    """Allowed, reserved and projected memory, and the size of the buffers that follows from them."""

    allowed: int
    reserved: int
    num_workers: int
    block_nbytes: int
    """Size of one buffer."""
    to_import: int
    """Memory that modules not yet imported and the records of files will add."""
    num_buffers: int
    """Buffers of one worker."""

    @property
    def projected(self) -> int:
        """Peak resident set of the process tree."""
        return (self.reserved + self.to_import + _SLACK
                + self.num_workers * (_PER_WORKER + self.num_buffers * self.block_nbytes))

    def problems(self, work: str) -> Iterator[ResourceError]:
        """An error if `work`, such as "the run", would exceed the limit."""
        if self.projected > self.allowed:
            fewer = ", or lower --workers" if self.num_workers > 1 else ""
            yield ResourceError(f"--max-memory {human(self.allowed)} cannot be kept: {work} would reach "
                                f"{human(self.projected)} with {counted(self.num_workers, 'worker')}; the process "
                                f"holds {human(self.reserved)} already; raise it{fewer}")


def parse_limit(allowed: int, reserved: int) -> int:
    """Most bytes of JSON, such as one header, that can be parsed at once within the limit while a plan grows."""
    to_import = 0 if "numpy" in sys.modules else _NUMPY_NBYTES  # safetensors imports it.
    return max(2**16, (allowed - reserved - to_import - _PLAN_NBYTES) // _PARSED_PER_BYTE)


def yaml_limit(allowed: int, reserved: int) -> int:
    """Most bytes of a YAML file that can be parsed within the limit: PyYAML takes some 340 bytes of memory for each."""
    return max(2**15, (allowed - reserved) // 512)


def plan_memory(allowed: int, reserved: int, num_workers: int, num_buffers: int, num_files: int = 0,
                held: int = 0) -> MemoryPlan:
    """The plan with the largest buffers that keep the limit; with the smallest buffers if none do (see
    `MemoryPlan.problems`). `held`: bytes of memory that documents take."""
    to_import = _NUMPY_NBYTES * ("numpy" not in sys.modules) + num_files * _PER_FILE + held
    plan = MemoryPlan(allowed, reserved, num_workers, MAX_BLOCK_NBYTES, to_import, num_buffers)
    while plan.projected > allowed and plan.block_nbytes > MIN_BLOCK_NBYTES:
        plan = replace(plan, block_nbytes=plan.block_nbytes // 2)
    return plan
