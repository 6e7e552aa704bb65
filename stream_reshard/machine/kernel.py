"""Facts about the machine: file systems, cores, limits, and the kernel's counters of this process."""
from __future__ import annotations

import math
import os
import re
import resource
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

NETWORK_FILE_SYSTEMS = frozenset("""
    nfs nfs4 cifs smb3 smbfs ceph lustre gpfs beegfs afs 9p virtiofs glusterfs ocfs2 gfs2 pvfs2 orangefs davfs
    fuse.sshfs fuse.glusterfs fuse.s3fs fuse.goofys fuse.gcsfuse fuse.rclone fuse.mount-s3 fuse.blobfuse2
    fuse.juicefs fuse.cephfs fuse.ceph""".split())
"""Types of file systems whose bytes come over a network: there each page fault of a mapping is a round trip."""

VIRTUAL_FILE_SYSTEMS = frozenset("""
    proc sysfs devtmpfs devpts securityfs debugfs tracefs cgroup cgroup2 cpuset pstore efivarfs bpf configfs fusectl
    mqueue hugetlbfs binfmt_misc selinuxfs smackfs rpc_pipefs nsfs nfsd resctrl sockfs pipefs anon_inodefs""".split())
"""Types of file systems whose files the kernel generates; they are on no disk."""


class Mount(NamedTuple):
    """A mounted file system."""

    device: str
    """As `major:minor`."""
    point: bytes
    """Path of the mount point."""
    kind: str
    """Type of the file system, such as ext4."""


def mounts(text: bytes) -> Iterator[Mount]:
    """The mounts in a text of /proc/self/mountinfo, in their order (proc_pid_mountinfo(5))."""
    for line in text.split(b"\n"):
        fields, _, rest = line.partition(b" - ")
        if len(words := fields.split(b" ")) > 4 and rest:
            yield Mount(words[2].decode(), _unescaped(words[4]), rest.split(b" ")[0].decode(errors="replace"))


def _unescaped(point: bytes) -> bytes:
    """A path of mountinfo, in which spaces, tabs, newlines and backslashes are written as three octal digits."""
    return re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8) & 0xFF]), point)


def file_system_of(path: Path) -> str:
    """Type of the file system that a path is on, such as ext4; "unknown" where the kernel does not report it."""
    try:
        device = os.stat(path).st_dev
        found = list(mounts(Path("/proc/self/mountinfo").read_bytes()))
    except OSError:
        return "unknown"
    wanted = f"{os.major(device)}:{os.minor(device)}"
    kinds = [mount.kind for mount in found if mount.device == wanted]
    return kinds[-1] if kinds else _by_mount_point(os.fsencode(os.path.realpath(path)), found)


def _by_mount_point(path: bytes, found: Iterable[Mount]) -> str:
    """Type of the file system with the longest mount point above a path. Needed where `st_dev` is not in mountinfo, as
    on btrfs. Of two mounts at one point the later one covers the other."""
    above = [mount for mount in found if path == mount.point or path.startswith(mount.point.rstrip(b"/") + b"/")]
    longest = max(reversed(above), key=lambda mount: len(mount.point), default=None)
    return longest.kind if longest else "unknown"


def read_ahead_nbytes(device: int) -> int:
    """Bytes that the kernel reads ahead in files on a device (`st_dev`); 0 where it does not report them.

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
    """Cores that this process may use: by its affinity and by the quota of its control groups, rounded up."""
    return max(1, min([len(os.sched_getaffinity(0)), *map(math.ceil, _quotas())]))


def _quotas() -> Iterator[float]:
    """Quota of each control group around this process, in cores (cgroup v2: cpu.max; v1: cpu.cfs_*)."""
    for folder in _groups("cpu"):
        for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
            try:
                quota, period = map(int, " ".join((folder / name).read_text() for name in names).split())
            except (OSError, ValueError):
                continue  # A file of the other version, or "max".
            if quota > 0 and period > 0:
                yield quota / period


def free_descriptors() -> int:
    """Number of files that this process can open beside those open now (RLIMIT_NOFILE)."""
    try:
        num_open = len(os.listdir("/proc/self/fd")) - 1
    except OSError:
        num_open = 3
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0] - num_open


def io_counters(since: Mapping[str, int] = {}) -> dict[str, int]:
    """Bytes that this process has moved, less those of an earlier count `since`: `rchar` and `wchar` by system calls,
    `read_bytes` and `write_bytes` from and to disks (proc(5), /proc/PID/io). Empty where the kernel does not count."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return {}
    counters = {key: int(value) for key, _, value in (line.partition(": ") for line in lines)}
    names = ("rchar", "wchar", "read_bytes", "write_bytes")
    return {name: counters.get(name, 0) - since.get(name, 0) for name in names}


def group_limit() -> int | None:
    """Lowest limit in bytes of the memory control groups around this process, page cache included; None without a
    limit."""
    limits = []
    for folder in _groups("memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            try:
                limits.append(int((folder / name).read_text()))
            except (OSError, ValueError):
                continue
    return min(limits, default=None)


_GROUPS, _OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
"""Mount point of control groups, and the file that lists those of this process."""


def _groups(controller: str) -> list[Path]:
    """Folders of the control group of this process for a controller, and of the groups around it (cgroups(7))."""
    found = []
    try:
        lines = _OWN_GROUPS.read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "" or controller in controllers.split(","):
            base = _GROUPS / controller if controllers else _GROUPS
            own = base / path.lstrip("/")
            # In a container the path is that of the host and may be absent here; the root is then the own group.
            found += [folder for folder in (own, *own.parents) if folder.is_relative_to(base)]
    return found
