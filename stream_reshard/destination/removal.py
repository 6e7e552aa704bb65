"""Only what is ours is removed: files that a journal, a manifest or Nanotron's naming rules name, and empty folders.

Links are not followed, mount points not entered. Anything else is told beforehand; what appears after that stays.
"""
from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from stream_reshard.destination.contents import Entry, entries_below
from stream_reshard.destination.journal import JOURNAL_NAME, names_in
from stream_reshard.destination.manifest import MANIFEST_NAME, open_manifest
from stream_reshard.errors import DestinationError, SourceError, quoted
from stream_reshard.storage.durable import TEMP_NAME
from stream_reshard.storage.small_files import is_silly_rename

_LAST = (MANIFEST_NAME, JOURNAL_NAME)
"""Removed when all the rest is: a run that is stopped halfway leaves what names the other files."""


@dataclass(frozen=True)
class Naming:
    """Names that a format gives to the files of its checkpoints, by path below the folder."""

    is_named: Callable[[str], bool]
    """The format has a file of this path."""
    is_weights: Callable[[str], bool]
    """It holds weights."""
    is_of_training: Callable[[str], bool]
    """A trainer adds it to a checkpoint that is there."""
    is_checkpoint: Callable[[Path], bool]
    """The folder looks like a checkpoint."""


def strangers(folder: Path, naming: Naming, names: Collection[str] = ()) -> Iterator[Entry]:
    """Entries of a folder that are not this tool's or the format's to remove. `names`: what is known beside that.
    Raises OSError where a folder cannot be listed."""
    is_ours = _ours(folder, naming, names)
    return (entry for entry in entries_below(folder)
            if entry.is_mount or not (entry.is_folder or (entry.is_file and is_ours(entry))))


def removal_problems(folder: Path, naming: Naming, cause: str) -> Iterator[DestinationError]:
    """The first thing in a folder that keeps it from being removed; `cause` says what would remove it."""
    try:
        if entry := next(strangers(folder, naming), None):
            yield stranger_error(folder, entry, f"{cause} would take it away")
    except OSError as error:
        yield DestinationError(f"{quoted(error.filename or folder)}: {error.strerror}, and {cause} has to know all "
                               f"that is in it")


def stranger_error(folder: Path, entry: Entry, cause: str) -> DestinationError:
    """The error a user sees of something that is not ours."""
    if entry.is_mount:
        return DestinationError(f"{quoted(folder / entry.path)} is a mount point, and {cause}; unmount it")
    return DestinationError(f"{quoted(folder)} holds {quoted(entry.path)}, which is no part of a checkpoint and would "
                            f"be lost: {cause}; move it away")


def _ours(folder: Path, naming: Naming, names: Collection[str]) -> Callable[[Entry], bool]:
    """Tells what is ours in a folder: with a manifest exactly what it names and what training adds; else what the
    format or a journal names."""
    try:
        manifest = open_manifest(folder)
    except SourceError:
        manifest = None
    by_rule = naming.is_of_training if manifest else naming.is_named
    has_journal = os.path.lexists(folder / JOURNAL_NAME)
    if has_journal:
        by_rule = naming.is_named
    written = {path for path in names_in(folder / JOURNAL_NAME) if not by_rule(path)} if has_journal else set()
    known, named = {*_LAST, *names, *written}, manifest.files if manifest else ()
    return lambda entry: (entry.path in known or entry.path in named or by_rule(entry.path)
                          or is_silly_rename(entry.name) or TEMP_NAME.fullmatch(entry.name) is not None)


def clear(folder: Path, naming: Naming, names: Collection[str] = ()) -> None:
    """Remove what is ours from a folder, and the folder if that was all. What cannot be removed stays. `names`: what is
    known beside what the folder itself tells."""
    if folder.is_symlink():
        return
    with suppress(OSError):
        is_ours, folders, has_failed = _ours(folder, naming, names), [], False
        for entry in entries_below(folder):
            if entry.is_folder:
                folders.append(folder / entry.path)
            elif entry.path not in _LAST and entry.is_file and is_ours(entry):
                has_failed |= not _removed(folder / entry.path)
        for path in reversed(folders):
            with suppress(OSError):
                path.rmdir()
        if not has_failed:
            for name in _LAST:
                (folder / name).unlink(missing_ok=True)
            folder.rmdir()


def _removed(path: Path) -> bool:
    try:
        path.unlink()
    except OSError:
        return False
    return True
