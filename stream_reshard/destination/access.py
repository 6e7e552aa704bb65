"""Modes of an output: group and others may do no more with it than with every source shard and every replaced file."""
from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from stream_reshard.destination.contents import entries_below
from stream_reshard.storage.folder import Access


def access_to(shards: Iterable[Path]) -> Access:
    """Access of group and others that every one of these files gives; absent files are left out."""
    access = Access()
    for path in shards:
        with suppress(FileNotFoundError):
            access &= Access.of_file(path.stat().st_mode)
    return access


def access_to_replaced(destination: Path) -> Access:
    """Access of group and others that a destination gives, together with every folder and file below it; full access if
    there is no such folder. Raises OSError."""
    access = Access()
    if destination.is_dir():
        access &= Access.of_folder(destination.stat().st_mode)
        for entry in entries_below(destination):
            if entry.is_folder:
                access &= Access.of_folder(entry.status.st_mode)
            elif entry.is_file:
                access &= Access(files=0o600 | stat.S_IMODE(entry.status.st_mode) & 0o066)
    return access


def access_notes(shards: Iterable[Path], replaced: Path | None) -> Iterator[str]:
    """A note if new files are less accessible than by the umask alone. `replaced`: a destination to be replaced."""
    usual = 0o666 & ~_umask()
    with suppress(OSError):  # The run itself reports files that cannot be read.
        if usual & ~(access := access_to(shards)).files:
            yield f"the shards are {_readers(access.files)}; so are the files of DST"
        elif replaced and usual & ~(access := access_to_replaced(replaced)).files:
            yield f"the old DST is {_readers(access.files)}; so are the files of the new one"


def _readers(mode: int) -> str:
    if mode & 0o004:
        return f"writable by fewer users than the umask allows ({mode:04o})"
    return f"readable by their owner {'and group only' if mode & 0o040 else 'only'} ({mode:04o})"


def _umask() -> int:
    """The umask of this process. Only proc(5) gives it without a change."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1], 8) for line in lines if line.startswith("Umask:"))
    except (OSError, StopIteration):
        os.umask(before := os.umask(0o077))
        return before
