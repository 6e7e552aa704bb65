"""The entries below a folder, without following links or entering other file systems."""
from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from stream_reshard.errors import DestinationError, ResourceError, StreamReshardError, quoted
from stream_reshard.machine.kernel import mounts
from stream_reshard.storage.small_files import is_silly_rename


class Entry(NamedTuple):
    """A file, folder, link or mount point below a folder."""

    path: str
    """Relative, with forward slashes."""
    status: os.stat_result
    """Status of the entry itself; a link is not followed."""
    is_mount: bool
    """Something is mounted at the entry; entries below it are left out."""

    @property
    def is_folder(self) -> bool:
        """A folder of this file system."""
        return stat.S_ISDIR(self.status.st_mode) and not self.is_mount

    @property
    def is_file(self) -> bool:
        """A regular file of this file system."""
        return stat.S_ISREG(self.status.st_mode) and not self.is_mount

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self.path.rpartition("/")[2]


def entries_below(root: Path) -> Iterator[Entry]:
    """All entries below a folder, each folder before its own entries, with one lstat per entry. Raises OSError if a
    folder cannot be listed. Entries that vanish meanwhile are left out."""
    mounts, device, waiting = mounts_below(root), os.stat(root).st_dev, [""]
    while waiting:
        folder = waiting.pop()
        for entry in _listed(root, folder):
            path = f"{folder}/{entry.name}" if folder else entry.name
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            is_folder = stat.S_ISDIR(status.st_mode)
            is_mount = path in mounts or (is_folder and status.st_dev != device)
            yield Entry(path, status, is_mount)
            if is_folder and not is_mount:
                waiting.append(path)


def _listed(root: Path, folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(root / folder) as found:
            return sorted(found, key=lambda entry: entry.name)
    except FileNotFoundError:
        if not folder:
            raise
        return []


def mounts_below(root: Path) -> set[str]:
    """Relative paths of the mount points below a folder, bind mounts of folders and files included (proc(5),
    mountinfo)."""
    above = os.fsencode(root.resolve()).rstrip(b"/") + b"/"
    try:
        found = mounts(Path("/proc/self/mountinfo").read_bytes())
    except OSError:
        return set()
    return {os.fsdecode(mount.point[len(above):]) for mount in found if mount.point.startswith(above)}


def faults(folder: Path, sizes: Mapping[str, int]) -> Iterator[StreamReshardError]:
    """Faults of a folder that should hold exactly the files of `sizes` (bytes by path): DestinationError for another
    entry, ResourceError for a missing or changed file. Raises OSError as `entries_below` does."""
    num_found = 0
    for entry in entries_below(folder):
        nbytes, path = sizes.get(entry.path), quoted(folder / entry.path)
        if nbytes is not None:
            num_found += 1
            if not entry.is_file:
                yield ResourceError(f"{path} is no file any more; something else has taken its place")
            elif entry.status.st_size != nbytes:
                yield ResourceError(f"{path} has {entry.status.st_size} bytes, and {nbytes} were written")
        elif not entry.is_folder and not is_silly_rename(entry.name):
            yield DestinationError(f"{path} was not written by this run; move it away and run the same command again")
    if num_found < len(sizes):
        missing = next((path for path in sizes if not os.path.lexists(folder / path)), ".")
        yield ResourceError(f"{quoted(folder / missing)} has vanished; {len(sizes) - num_found} of {len(sizes)} files "
                            f"are missing")
