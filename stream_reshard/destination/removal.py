"""Removal of folders of this tool. Own entries are files that a journal, a manifest or the naming rules of the format
name, and empty folders; nothing else is removed.

Links are not followed, mount points not entered. Strangers, the other entries, are reported before a run; those that
appear later stay.
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
"""Files that are removed last, since they name the others: a stopped removal can then be continued."""


@dataclass(frozen=True)
class Naming:
    """Names that a format gives to the files of its checkpoints, by path below the folder."""

    is_named: Callable[[str], bool]
    """True for the path of a file of the format."""
    is_weights: Callable[[str], bool]
    """True for the path of a file with weights."""
    is_of_training: Callable[[str], bool]
    """True for the path of a file that a trainer adds to a checkpoint."""
    is_checkpoint: Callable[[Path], bool]
    """True for a folder that looks like a checkpoint."""


def strangers(folder: Path, naming: Naming, names: Collection[str] = ()) -> Iterator[Entry]:
    """Entries of a folder that must not be removed. `names`: paths of further own files. Raises OSError if a folder
    cannot be listed."""
    is_own = _own_entries(folder, naming, names)
    return (entry for entry in entries_below(folder)
            if entry.is_mount or not (entry.is_folder or (entry.is_file and is_own(entry))))


def removal_problems(folder: Path, naming: Naming, cause: str) -> Iterator[DestinationError]:
    """A problem for the first entry of a folder that must not be removed; `cause` names what would remove it."""
    try:
        if entry := next(strangers(folder, naming), None):
            yield stranger_error(folder, entry, f"{cause} would remove it")
    except OSError as error:
        yield DestinationError(f"{quoted(error.filename or folder)}: {error.strerror}, and {cause} has to list all "
                               f"that is in it")


def stranger_error(folder: Path, entry: Entry, cause: str) -> DestinationError:
    """The error for an entry that must not be removed."""
    if entry.is_mount:
        return DestinationError(f"{quoted(folder / entry.path)} is a mount point, and {cause}; unmount it")
    return DestinationError(f"{quoted(folder)} holds {quoted(entry.path)}, which is no part of a checkpoint and would "
                            f"be lost: {cause}; move it away")


def _own_entries(folder: Path, naming: Naming, names: Collection[str]) -> Callable[[Entry], bool]:
    """A function that is True for the own entries of a folder. With a manifest and no journal those are the files
    that the manifest names or training adds; else those that the format, the journal or the manifest names."""
    try:
        manifest = open_manifest(folder)
    except SourceError:
        manifest = None
    has_journal = os.path.lexists(folder / JOURNAL_NAME)
    by_rule = naming.is_of_training if manifest and not has_journal else naming.is_named
    written = {path for path in names_in(folder / JOURNAL_NAME) if not by_rule(path)} if has_journal else set()
    known, named = {*_LAST, *names, *written}, manifest.files if manifest else ()
    return lambda entry: (entry.path in known or entry.path in named or by_rule(entry.path)
                          or is_silly_rename(entry.name) or TEMP_NAME.fullmatch(entry.name) is not None)


def clear(folder: Path, naming: Naming, names: Collection[str] = ()) -> None:
    """Remove the own entries of a folder, and the folder if it is then empty. Entries that cannot be removed stay.
    `names`: paths of further own files."""
    if folder.is_symlink():
        return
    with suppress(OSError):
        is_own, folders, has_failed = _own_entries(folder, naming, names), [], False
        for entry in entries_below(folder):
            if entry.is_folder:
                folders.append(folder / entry.path)
            elif entry.path not in _LAST and entry.is_file and is_own(entry):
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
