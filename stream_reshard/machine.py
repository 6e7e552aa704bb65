"""What the machine says of itself: file systems, cores, and what the kernel has counted for this process."""
from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

NETWORK_FILE_SYSTEMS = frozenset("""
    nfs nfs4 cifs smb3 smbfs ceph lustre gpfs beegfs afs 9p virtiofs glusterfs ocfs2 gfs2 pvfs2 orangefs davfs
    fuse.sshfs fuse.glusterfs fuse.s3fs fuse.goofys fuse.gcsfuse fuse.rclone fuse.mount-s3 fuse.blobfuse2
    fuse.juicefs fuse.cephfs fuse.ceph""".split())
"""Types whose bytes come over a network: each page that a mapping misses would cost a journey of its own there."""


def file_system_of(path: Path) -> str:
    """The type of the file system that a path is on, such as ext4; "unknown" where the kernel does not tell."""
    try:
        device = os.stat(path).st_dev
        wanted = f"{os.major(device)}:{os.minor(device)}"
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return "unknown"
    types = {fields[2]: rest.split()[0] for fields, rest in (
        (line.split(), line.partition(" - ")[2]) for line in lines) if rest}
    return types.get(wanted) or _by_mount_point(path, lines)


def _by_mount_point(path: Path, lines: list[str]) -> str:
    """The type by the longest mount point above a path: the devices of btrfs are other ones than mountinfo's."""
    real, found = path.resolve(), ("", "unknown")
    for line in lines:
        point = line.split()[4].encode().decode("unicode_escape")
        if real.is_relative_to(point) and len(point) >= len(found[0]):
            found = point, line.partition(" - ")[2].split()[0]
    return found[1]


def read_ahead_nbytes(device: int) -> int:
    """How far the kernel reads ahead in files on a device (`st_dev`), in bytes; 0 where it does not tell.

    Source: sysfs-class-bdi, and for a partition the queue of its disk (sysfs-block).
    """
    number = f"{os.major(device)}:{os.minor(device)}"
    for path in (f"/sys/class/bdi/{number}/read_ahead_kb", f"/sys/dev/block/{number}/../queue/read_ahead_kb"):
        try:
            return int(Path(path).read_text()) * 1024
        except (OSError, ValueError):
            continue
    return 0


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def io_counters(since: Mapping[str, int] = {}) -> dict[str, int]:
    """Bytes this process has moved so far, or since it counted `since`: `rchar` and `wchar` by reading and writing
    calls, `read_bytes` and `write_bytes` from and to disks (proc(5), /proc/PID/io). Empty where nothing is counted."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return {}
    counters = {key: int(value) for key, _, value in (line.partition(": ") for line in lines)}
    names = ("rchar", "wchar", "read_bytes", "write_bytes")
    return {name: counters.get(name, 0) - since.get(name, 0) for name in names}


def group_limit() -> int | None:
    """Bytes that the memory control groups around this process allow, page cache included; None where none does."""
    limits = []
    for folder in _memory_groups():
        for name in ("memory.max", "memory.limit_in_bytes"):
            try:
                limits.append(int((folder / name).read_text()))
            except (OSError, ValueError):
                continue
    return min(limits, default=None)


def _memory_groups() -> list[Path]:
    """Folders of the memory control group of this process and of those around it (cgroups(7))."""
    root, found = Path("/sys/fs/cgroup"), []
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "" or "memory" in controllers.split(","):
            base = root / "memory" if controllers else root
            own = base / path.lstrip("/")
            # Inside a container the path is that of the host, and the group is mounted at the root.
            found += [folder for folder in (own, *own.parents) if folder.is_relative_to(base)]
    return found
