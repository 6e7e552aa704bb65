"""Power cuts on real file systems: what was not synced is gone, and still the destination is absent, or whole and right.

ext4 and XFS on loop devices are shut down without flushing their logs (an ioctl that both know), as a power cut does.
"""
import fcntl
import os
import random
import shutil
import signal
import struct
import subprocess

import pytest
from faults import Case, after_fault, campaign, plain

SHUTDOWN, NO_LOG_FLUSH = 0x8004587D, 2
"""EXT4_IOC_SHUTDOWN and XFS_IOC_GOINGDOWN are one number."""

MAKE = {"ext4": ["mkfs.ext4", "-q", "-F"], "xfs": ["mkfs.xfs", "-q", "-f"]}
SIZES = {"ext4": 64 * 2**20, "xfs": 320 * 2**20}

pytestmark = [pytest.mark.skipif(os.geteuid() != 0, reason="mounting a loop device needs root")]


def run(*command):
    subprocess.run(list(map(str, command)), check=True, capture_output=True)


class Disk:
    """A file system of its own, on a loop device."""

    def __init__(self, folder, kind):
        self.image, self.mounted = folder / "image", folder / "mnt"
        self.mounted.mkdir(parents=True)
        with open(self.image, "wb") as stream:
            stream.truncate(SIZES[kind])
        run(*MAKE[kind], self.image)
        self.mount()

    def mount(self):
        run("mount", "-o", "loop", self.image, self.mounted)

    def cut_power(self):
        """From now on nothing reaches the disk, not even what the log holds."""
        descriptor = os.open(self.mounted, os.O_RDONLY)
        fcntl.ioctl(descriptor, SHUTDOWN, struct.pack("i", NO_LOG_FLUSH))
        os.close(descriptor)

    def restart(self):
        """Start the machine again."""
        run("umount", self.mounted)
        self.mount()


def maker(kind):
    def make(folder):
        disk = Disk(folder, kind)
        case = Case(folder, destination=disk.mounted / "made" / "too" / "nt", before=lambda case: remove_above(disk))
        case.disk = disk
        return case
    return make


def remove_above(disk):
    """The folders above the destination are made by the run too, and must be as durable as what is in them."""
    shutil.rmtree(disk.mounted / "made", ignore_errors=True)
    run("sync", "-f", disk.mounted)


def cut(case, at):
    """Cut the power after a call; `at` None: after the run has ended well."""
    def act(number, name, call):
        try:
            return call()
        finally:
            if number == at:
                case.disk.cut_power()
                os.kill(os.getpid(), signal.SIGKILL)

    case.clear()
    code, err = case.run(act if at else plain)
    if at is None:
        case.disk.cut_power()
    case.disk.restart()
    if code != (-signal.SIGKILL if at else 0):
        return f"ended with {code}: {err}"
    if at is None and case.tree() != case.wanted:
        return "reported as done, and lost"
    return after_fault(case)


def unmount_all(folder):
    for mounted in folder.rglob("mnt"):
        subprocess.run(["umount", mounted], check=False)


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
@pytest.mark.parametrize("number", [pytest.param(6, id="sample"), pytest.param(100, id="all",
                                                                               marks=pytest.mark.heavy)])
def test_power_cut(tmp_path, figures, kind, number):
    if not shutil.which(MAKE[kind][0]):
        pytest.skip(f"{MAKE[kind][0]} is not installed")
    try:
        try:
            count = len(maker(kind)(tmp_path / "count").operations)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no loop device here: {error.stderr}")
        points = random.Random(5).sample(range(2, count + 1), number - 1) + [None]
        figures(f"power cuts, {kind}", *campaign(tmp_path, maker(kind), cut, points))
    finally:
        unmount_all(tmp_path)
