"""The identity of a file: what tells it from another one, and from itself after a change."""
from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from stream_reshard.errors import SourceError, quoted

Identity = list[int]
"""See `identity_of`."""


def identity_of(status: os.stat_result) -> Identity:
    """[device, inode, size in bytes, mtime in ns, ctime in ns]. The last one changes also where a file was written to
    and its mtime was put back."""
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def lasting(identity: Identity) -> Identity:
    """[size in bytes, mtime in ns, ctime in ns]: the part of an identity that a remount, a reboot and another machine
    leave as it is. Devices are numbered by the mount, and on FUSE inodes too."""
    return identity[2:]


def identities_of(root: Path, paths: Iterable[str]) -> dict[str, Identity]:
    """The identity of each of these files that is there, by its path below `root`."""
    found = {}
    for path in paths:
        try:
            status = os.stat(root / path)
        except OSError:
            continue  # Opening it says what is wrong.
        found[path] = identity_of(status)
    return found


def changed(path: str, before: Identity, now: Identity | None) -> SourceError:
    """The error of a source file that is not the one the plan saw; `now` is None where it vanished."""
    names = ("device", "inode", "size", "mtime", "ctime")
    if now is None:
        what = "it vanished"
    else:
        name, old, new = next(row for row in zip(names, before, now) if row[1] != row[2])
        what = f"its {name} was {old}, and is {new}"
    return SourceError(f"{quoted(path)} changed during the run: {what}; nothing was committed, run again with "
                       f"--restart once the source is at rest")
