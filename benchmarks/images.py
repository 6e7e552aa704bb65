"""File systems that share blocks (XFS with reflink, btrfs) in a file, mounted over a loop device. Root only."""
from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MAKERS = {"xfs": ("mkfs.xfs", "-q", "-m", "reflink=1"), "btrfs": ("mkfs.btrfs", "-q")}


@contextmanager
def mounted(kind: str, folder: Path, nbytes: int) -> Iterator[Path]:
    """A new file system of this size below `folder`. Raises OSError where a tool or a right is missing."""
    folder.mkdir()
    image, point = folder / "image", folder / "mount"
    point.mkdir()
    with open(image, "wb") as stream:
        stream.truncate(nbytes)
    try:
        _run(*MAKERS[kind], str(image))
        # Direct: what the file system writes is not cached a second time as pages of the image.
        device = _run("losetup", "--find", "--show", "--direct-io=on", str(image)).strip()
        try:
            _run("mount", device, str(point))
            try:
                yield point
            finally:
                _run("umount", str(point))
        finally:
            _run("losetup", "--detach", device)
    finally:
        image.unlink()


def _run(*command: str) -> str:
    """Output of a system tool."""
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except subprocess.CalledProcessError as error:
        raise OSError(f"{command[0]}: {error.stderr.strip()}") from error


def used_nbytes(folder: Path) -> int:
    """Bytes that the file system of a folder holds, once everything is on disk."""
    os.sync()
    facts = os.statvfs(folder)
    return (facts.f_blocks - facts.f_bfree) * facts.f_frsize
