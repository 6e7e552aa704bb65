"""Private stays private: nobody may do more with an output than with every file that it is made of or replaces."""
from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from stream_reshard.destination.contents import entries_below
from stream_reshard.storage.folder import Access


def access_to(shards: Iterable[Path]) -> Access:
    """Access for group and others that all of these files give; a file that is not there any more is left out."""
    access = Access()
    for path in shards:
        with suppress(FileNotFoundError):
            access &= Access.of_file(path.stat().st_mode)
    return access


def access_to_replaced(destination: Path) -> Access:
    """The most that a folder that is replaced, the folders below it and their files let group and others do; everything
    where there is none. Raises OSError."""
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
    """A line where new files are less accessible than the umask alone would have them."""
    usual = 0o666 & ~_umask()
    with suppress(OSError):  # The run itself says what cannot be read.
        if usual & ~(access := access_to(shards)).files:
            yield f"the shards are {_readers(access.files)}; so are the files of DST"
        elif replaced and usual & ~(access := access_to_replaced(replaced)).files:
            yield f"what is replaced is {_readers(access.files)}; so are the files of DST"


def _readers(mode: int) -> str:
    if mode & 0o004:
        return f"writable by fewer than the umask lets ({mode:04o})"
    return f"readable by their owner {'and group only' if mode & 0o040 else 'only'} ({mode:04o})"


def _umask() -> int:
    """Of this process; it cannot be asked for without changing it but by proc(5)."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1], 8) for line in lines if line.startswith("Umask:"))
    except (OSError, StopIteration):
        os.umask(before := os.umask(0o077))
        return before
