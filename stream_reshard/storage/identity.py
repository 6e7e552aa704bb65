"""The identity of a file, by which another file in its place, or a change, is noticed."""
from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from stream_reshard.errors import SourceError, quoted

Identity = list[int]
"""See `identity_of`."""


def identity_of(status: os.stat_result) -> Identity:
    """[device, inode, size in bytes, mtime in ns, ctime in ns]. The ctime changes even if somebody writes to the file
    and then sets its mtime back."""
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def lasting(identity: Identity) -> Identity:
    """[size in bytes, mtime in ns, ctime in ns]: the part of an identity that stays equal after a remount or a reboot,
    and on another machine. A mount numbers its device anew, and on FUSE the inodes too."""
    return identity[2:]


def identities_of(root: Path, paths: Iterable[str]) -> dict[str, Identity]:
    """The identity of each of these files, by its path below `root`; absent files are left out."""
    found = {}
    for path in paths:
        try:
            status = os.stat(root / path)
        except OSError:
            continue  # Whoever opens it reports the error.
        found[path] = identity_of(status)
    return found


def changed(path: str, before: Identity, now: Identity | None) -> SourceError:
    """The error for a source file that changed since the plan; `now` is None if the file vanished."""
    names = ("device", "inode", "size", "mtime", "ctime")
    if now is None:
        what = "it vanished"
    else:
        name, old, new = next(row for row in zip(names, before, now) if row[1] != row[2])
        what = f"its {name} was {old}, and is {new}"
    return SourceError(f"{quoted(path)} changed during the run: {what}; nothing was committed, run again with "
                       f"--restart once the source is at rest")
