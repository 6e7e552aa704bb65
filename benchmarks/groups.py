"""Memory control groups: a limit that the kernel enforces, page cache counted, version 1 or 2. Root only."""
from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Group:
    """A control group of our own."""

    path: Path
    nbytes: int

    def wrap(self, command: tuple[str, ...]) -> tuple[str, ...]:
        """The command, so that it enters the group before it becomes itself (same process)."""
        return ("sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self.path / "cgroup.procs"), *command)


@contextmanager
def memory_group(nbytes: int) -> Iterator[Group]:
    """A group with this limit on memory and page cache. Raises OSError where none can be made."""
    is_second = (_ROOT / "cgroup.controllers").exists()
    if is_second and "memory" not in (_ROOT / "cgroup.subtree_control").read_text().split():
        raise OSError("the memory controller is not delegated")
    path = Path(tempfile.mkdtemp(prefix="stream_reshard_bench_", dir=_ROOT if is_second else _ROOT / "memory"))
    try:
        (path / ("memory.max" if is_second else "memory.limit_in_bytes")).write_text(str(nbytes))
        yield Group(path, nbytes)
    finally:
        path.rmdir()
