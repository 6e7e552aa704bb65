"""Memory: parse a limit, the limit of the machine, memory held now, memory that a run will reach. All in bytes.

*allowed* is the limit on the peak resident set of the whole process tree, *reserved* is what it holds before the work
starts (measured), *projected* is what the work will bring it to. Words and idea are those of the cubed project.
"""
from __future__ import annotations

import mmap
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from stream_reshard.errors import ResourceError, UsageError, quoted
from stream_reshard.machine.kernel import free_descriptors, group_limit, num_cores

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
          "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}

DEFAULT_ALLOWED = 512 * 2**20
MAX_BLOCK_NBYTES = 2 * 2**20
MIN_BLOCK_NBYTES = 64 * 2**10

VERIFY_BUFFERS = 2
"""Buffers that a worker of a comparison has."""

VERIFY_NBYTES = 3 * 2**20
"""Memory of a check at the end of a run, beside its buffers: modules imported late, records of the source."""

_MANY_WORKERS_NBYTES = 2**28
_MAX_DEFAULT_WORKERS = 8

_PER_WORKER = 2 * 2**20
"""Memory of a thread, beside its buffers: its stack, lists of pieces."""
_SLACK = 6 * 2**20
"""Memory of a run, beside its workers: the journal, the manifest, modules imported late."""
TORCH_NBYTES = 230 * 2**20
"""Memory that importing torch adds."""
_NUMPY_NBYTES = 16 * 2**20
"""Memory that importing numpy adds."""
_NUMPY_SPACE_NBYTES, _BLAS_THREAD_NBYTES = 2**26, 2**25
"""Address space that importing numpy takes, and for each core; hardly any of it is touched."""
_NUM_DESCRIPTORS = 8
"""Files that are open at once whatever is done: configs, a header, folders that are listed, modules being imported."""
_PER_FILE = 2048
"""Memory of a target file: its records, and its part of the manifest."""
_PLAN_NBYTES = 5 * 2**20
"""Memory of headers and index: a few bytes per tensor."""
_PARSED_PER_BYTE = 56
"""Bytes that parsing a byte of JSON takes, at most: nested empty lists in a text with one wide character."""


def parse_nbytes(text: str) -> int:
    """ "512MiB", "64 mb" or "1000000" in bytes. Raises UsageError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if not match or len(text) > 40 or match[2].lower() not in _UNITS or not float(match[1]):
        raise UsageError(f"{quoted(text)} is not a size; write it as 512MiB, 64MiB or 1GB")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def human(nbytes: float) -> str:
    """A size for people: binary units, as limits are given."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} TiB"


def _check_address_space() -> None:
    """Raises MemoryError where numpy, which safetensors imports, would find no room for the threads of its BLAS: that
    ends the process without a word of Python's."""
    if "numpy" in sys.modules or resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY:
        return
    try:
        mmap.mmap(-1, _NUMPY_SPACE_NBYTES + num_cores() * _BLAS_THREAD_NBYTES, mmap.MAP_PRIVATE).close()
    except OSError as error:
        raise MemoryError from error


def _check_descriptors() -> None:
    if (num_free := free_descriptors()) < _NUM_DESCRIPTORS:
        raise ResourceError(f"{num_free} more files can be opened at once, and at least {_NUM_DESCRIPTORS} are needed; "
                            f"raise the limit (ulimit -n)")


@contextmanager
def granted() -> Iterator[None]:
    """Meanwhile memory or a thread that the system refuses is a ResourceError: limits of the shell or of a control
    group may be smaller than what was planned with. Raises it at once where hardly a file can be opened."""
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
    """Resident set of the process tree now."""
    import psutil
    process = psutil.Process()
    return sum(int(one.memory_info().rss) for one in (process, *process.children(recursive=True)))


def peak_resident() -> int:
    """Highest resident set of this process so far (VmHWM, which unlike ru_maxrss forgets the parent's)."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def machine_limit() -> int:
    """All memory of the machine, or of the control group of this process."""
    import psutil
    total, group = int(psutil.virtual_memory().total), group_limit()
    return total if group is None else min(total, group)


def default_workers(allowed: int, num_cores: int) -> int:
    """Workers where nobody says how many: what measured best. A disk likes one stream that is read in order, and a
    worker keeps two cores busy; more help where there are many cores and, usually, many disks."""
    return 1 if allowed < _MANY_WORKERS_NBYTES else min(max(1, num_cores // 8), _MAX_DEFAULT_WORKERS)


@dataclass(frozen=True)
class MemoryPlan:
    """The three numbers, and the buffers that follow from them."""

    allowed: int
    reserved: int
    num_workers: int
    block_nbytes: int
    """Size of one buffer."""
    casts: bool
    """Buffers for results of casts are needed too."""
    to_import: int
    """Memory added before the work begins: modules that are imported later, records of files."""
    num_buffers: int
    """Buffers that one worker has."""

    @property
    def projected(self) -> int:
        """Peak that the process tree will reach."""
        buffers = self.num_buffers + 2 * self.casts
        return (self.reserved + self.to_import + _SLACK
                + self.num_workers * (_PER_WORKER + buffers * self.block_nbytes))

    def problems(self, work: str) -> Iterator[ResourceError]:
        """An error where `work` (such as "the run") would exceed the limit."""
        if self.projected > self.allowed:
            yield ResourceError(f"--max-memory {human(self.allowed)} cannot be kept: {work} would reach "
                                f"{human(self.projected)} with {self.num_workers} workers"
                                f"{' and torch for casts' if self.casts else ''}; raise it, or lower --workers")


def parse_limit(allowed: int, reserved: int) -> int:
    """Bytes of JSON that can be parsed at once in what is left of the limit: one header, while a plan is growing."""
    to_import = 0 if "numpy" in sys.modules else _NUMPY_NBYTES  # safetensors imports it.
    return max(2**16, (allowed - reserved - to_import - _PLAN_NBYTES) // _PARSED_PER_BYTE)


def yaml_limit(allowed: int, reserved: int) -> int:
    """Bytes of a YAML file that can be parsed in what is left of the limit: PyYAML takes some 340 for each."""
    return max(2**15, (allowed - reserved) // 512)


def plan_memory(allowed: int, reserved: int, num_workers: int, casts: bool, num_buffers: int,
                num_files: int = 0, held: int = 0) -> MemoryPlan:
    """The largest buffers that keep the limit; the smallest ones where none do (compare `projected`). `held`: bytes
    that documents beside the weights take."""
    to_import = TORCH_NBYTES if casts and "torch" not in sys.modules else 0
    to_import += num_files * _PER_FILE + held
    to_import += _NUMPY_NBYTES if not casts and "numpy" not in sys.modules else 0
    plan = MemoryPlan(allowed, reserved, num_workers, MAX_BLOCK_NBYTES, casts, to_import, num_buffers)
    while plan.projected > allowed and plan.block_nbytes > MIN_BLOCK_NBYTES:
        plan = replace(plan, block_nbytes=plan.block_nbytes // 2)
    return plan
