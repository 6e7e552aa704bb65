"""What the machine says of itself: mounts under any name, cores as control groups grant them, files that can be opened."""
import os
import resource
import shutil
import subprocess

import pytest

from stream_reshard.machine import kernel as machine
from stream_reshard.machine.kernel import Mount, file_system_of, mounts, num_cores

POINTS = {"/données": "/données", "/a\\040b": "/a b", "/tab\\011x": "/tab\tx", "/line\\012x": "/line\nx",
          "/back\\134slash": "/back\\slash", "/\\134040": "/\\040", "/\U0001f600": "/\U0001f600", "/x\u2028y": "/x\u2028y",
          "/n\u0085l": "/n\u0085l", "/bytes\udcff": "/bytes\udcff", "/": "/", "/plain": "/plain", "/v\x0bt\x0cf": "/v\x0bt\x0cf",
          "/carriage\rx": "/carriage\rx"}


@pytest.mark.parametrize("told, point", POINTS.items(), ids=ascii)
def test_mount_points_are_read_as_they_are(told, point):
    """Spaces, tabs, newlines and backslashes are octal digits; all else is bytes as they are."""
    text = f"22 1 0:42 / {told} rw,relatime shared:1 master:2 - btrfs /dev/x rw\n1 2\n\n".encode(errors="surrogateescape")
    assert list(mounts(text)) == [Mount("0:42", os.fsencode(point), "btrfs")]


def test_the_longest_mount_point_above_counts_and_the_last_at_one_point():
    found = [Mount("", b"/", "ext4"), Mount("", b"/data", "xfs"), Mount("", "/données".encode(), "btrfs"),
             Mount("", b"/data", "nfs4"), Mount("", b"/dat", "tmpfs")]
    for path, kind in {"/data": "nfs4", "/data/x": "nfs4", "/database": "ext4", "/données/x/y": "btrfs", "/": "ext4",
                       "/donn": "ext4", "/dat": "tmpfs"}.items():
        assert machine._by_mount_point(path.encode(), found) == kind, path
    assert machine._by_mount_point(b"/x", []) == "unknown"


def test_a_file_that_cannot_be_seen_is_on_no_known_file_system(tmp_path):
    assert file_system_of(tmp_path / "gone") == "unknown" and file_system_of("/proc/self/status") == "proc"


@pytest.mark.heavy
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mkfs.btrfs"), reason="needs root and mkfs.btrfs")
def test_a_btrfs_at_a_folder_that_is_not_ascii_is_found(tmp_path):
    """Its files have other device numbers than its mount, so the name of the mount point decides."""
    image, point = tmp_path / "image", tmp_path / "données é\u2028 x"
    point.mkdir()
    with open(image, "wb") as stream:
        stream.truncate(2**28)
    subprocess.run(["mkfs.btrfs", "-q", "-f", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, point], check=True)
    try:
        (point / "file").touch()
        assert file_system_of(point / "file") == file_system_of(point) == "btrfs"
    finally:
        subprocess.run(["umount", point], check=True)


GROUPS = [
    ("0::/a/b", {"a/b/cpu.max": "max 100000"}, 64), ("0::/a/b", {"a/b/cpu.max": "200000 100000"}, 2),
    ("0::/a/b", {"a/b/cpu.max": "150000 100000\n"}, 2), ("0::/a/b", {"a/b/cpu.max": "10000 100000"}, 1),
    ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "350000 100000"}, 4),
    ("0::/a/b", {"a/b/cpu.max": "800000 100000", "a/cpu.max": "300000 100000"}, 3),
    ("0::/", {"cpu.max": "200000 100000"}, 2), ("0::/../other", {"cpu.max": "500000 100000"}, 5),
    ("0::/host/path", {"cpu.max": "200000 50000"}, 4), ("0::/a", {"a/cpu.max": "nonsense"}, 64),
    ("0::/a", {"a/cpu.max": ""}, 64), ("0::/a", {"a/cpu.max": "0 100000"}, 64), ("0::/a", {"a/cpu.max": "100000 0"}, 64),
    ("3:cpu,cpuacct:/a", {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"}, 64),
    ("3:cpu,cpuacct:/a", {"cpu/a/cpu.cfs_quota_us": "250000\n", "cpu/a/cpu.cfs_period_us": "100000\n"}, 3),
    ("3:cpu:/a/b", {"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000",
                    "cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"}, 2),
    ("4:memory:/a\n3:cpu:/a\n0::/", {"cpu/a/cpu.cfs_quota_us": "100000", "cpu/a/cpu.cfs_period_us": "100000"}, 1),
    ("4:memory:/a", {"memory/a/cpu.max": "100000 100000"}, 64), ("", {"cpu.max": "100000 100000"}, 64)]


@pytest.mark.parametrize("own, files, cores", GROUPS)
def test_cores_are_those_that_control_groups_grant(tmp_path, monkeypatch, own, files, cores):
    """In all groups around the process, rounded up, in both versions of control groups (cgroups(7))."""
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    (tmp_path / "own").write_text(own)
    monkeypatch.setattr(machine, "_GROUPS", tmp_path)
    monkeypatch.setattr(machine, "_OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    assert num_cores() == cores


def test_cores_are_never_more_than_may_be_used(monkeypatch):
    monkeypatch.setattr(machine, "_quotas", lambda: iter([0.01, 7.5]))
    assert num_cores() == 1
    monkeypatch.setattr(machine, "_quotas", lambda: iter([]))
    assert num_cores() == len(os.sched_getaffinity(0))


def test_files_that_can_be_opened_are_counted():
    before, limit = machine.free_descriptors(), resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    files = [os.open(os.devnull, os.O_RDONLY) for _ in range(5)]
    try:
        assert machine.free_descriptors() == before - 5 < limit
    finally:
        for file in files:
            os.close(file)
