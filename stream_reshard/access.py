"""Private stays private: nobody may do more with an output than with every file that it is made of or replaces."""
from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from stream_reshard.contents import entries_below
from stream_reshard.folder import Access


def access_to(shards: Iterable[Path]) -> Access:
    """What all of these files let group and others do. Raises OSError."""
    access = Access()
    for path in shards:
        access &= Access.of_file(path.stat().st_mode)
    return access


def access_to_replaced(destination: Path) -> Access:
    """What a folder that is replaced, the folders below it and their files let group and others do; everything where
    there is none."""
    access = Access()
    if destination.is_dir():
        access &= Access.of_folder(destination.stat().st_mode)
        for entry in entries_below(destination):
            if entry.is_folder:
                access &= Access.of_folder(entry.status.st_mode)
            elif entry.is_file:
                access &= Access(stat.S_IMODE(entry.status.st_mode) & 0o066 | 0o600)
    return access


def access_notes(shards: Iterable[Path], destination: Path | None) -> Iterable[str]:
    """A line where new files are less accessible than the umask alone would have them."""
    usual = 0o666 & ~_umask()
    for what, access in (("the shards", access_to(shards)), (
            "DST and what stands in it", access_to_replaced(destination) if destination else Access())):
        if usual & ~access.files:
            readers = ("their owner" if not access.files & 0o044 else "their owner and group"
                       if not access.files & 0o004 else None)
            yield (f"{what} are {'readable' if readers else 'writable'} by {readers or 'fewer than the umask lets'} "
                   f"{'only ' if readers else ''}({access.files:04o}); so are the files of DST")
            return


def _umask() -> int:
    """Of this process; it cannot be asked for without changing it but by proc(5)."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1], 8) for line in lines if line.startswith("Umask:"))
    except (OSError, StopIteration):
        os.umask(before := os.umask(0o077))
        return before
