"""The staging folder `DST.partial`: where the destination grows, and how it becomes the destination.

It holds a journal while files are missing, and a manifest once all are written; both identify the run.
"""
from __future__ import annotations

import errno
import json
import os
import re
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from stream_reshard.destination.contents import Entry, entries_below, faults
from stream_reshard.destination.journal import JOURNAL_NAME, Journal, Record, Written, is_journal, read_done
from stream_reshard.destination.lock import Lock
from stream_reshard.destination.manifest import (
    MANIFEST_NAME, MAX_FILE_NBYTES, FileDone, Manifest, read_manifest, same_run)
from stream_reshard.destination.removal import Naming, clear, stranger_error, strangers
from stream_reshard.errors import DestinationError, ResourceError, SourceError, quoted
from stream_reshard.machine.kernel import file_system_of
from stream_reshard.storage.durable import (
    TEMP_NAME, NewFile, WriteFault, exchange, make_folder, sync_folder, sync_names, target_error)
from stream_reshard.storage.folder import Access, Folder

SUFFIX_NBYTES = len("..0123456789ab.replaced")
"""Bytes by which the longest name of a sibling (`_new_name_beside`) exceeds the name of the destination."""

CONFIRM_SECONDS = 1.0
"""Least time between two checks of lock and folder; they are checked between jobs."""

COPY_NBYTES = 2**20
"""Bytes of a companion that are copied at a time: a tokenizer may be larger than the memory that is left."""


def staging_of(destination: Path) -> Path:
    """The sibling folder in which the destination grows."""
    return destination.with_name(destination.name + ".partial")


def lock_of(destination: Path) -> Path:
    """The lock file beside the destination."""
    return destination.with_name(destination.name + ".partial.lock")


def _new_name_beside(destination: Path) -> Path:
    """A new path, beside the destination, for a folder that will be removed."""
    return destination.with_name(f".{destination.name}.{os.urandom(6).hex()}.replaced")


def replaced_beside(destination: Path) -> Iterator[Path]:
    """Folders that an earlier run renamed to remove them, and did not remove."""
    pattern = re.compile(rf"\.{re.escape(destination.name)}\.[0-9a-f]{{12}}\.replaced")
    beside = destination.parent.iterdir() if os.path.isdir(destination.parent) else ()
    return (path for path in beside if pattern.fullmatch(path.name))


def manifest_of(folder: Path, run: Mapping[str, Any], max_files: int) -> Manifest | None:
    """The manifest of a folder, if it is that of this run; else None."""
    try:
        manifest = read_manifest(folder, max_files * MAX_FILE_NBYTES)
    except SourceError:
        return None
    return manifest if manifest is not None and same_run(manifest.run, run) else None


def finished(folder: Path, run: Mapping[str, Any], max_files: int) -> Manifest | None:
    """The manifest of a folder that holds the finished output of this run, with exactly its files, each of the right
    size; else None. Raises DestinationError if a folder in it cannot be read."""
    manifest = manifest_of(folder, run, max_files)
    if manifest is None:
        return None
    sizes = {path: file.nbytes for path, file in manifest.files.items()}
    try:
        sizes[MANIFEST_NAME] = (folder / MANIFEST_NAME).lstat().st_size
        return None if any(faults(folder, sizes)) else manifest
    except FileNotFoundError:
        return None
    except OSError as error:
        raise target_error(Path(error.filename or folder), error) from error


def as_json(value: Mapping[str, Any]) -> Any:
    """A value as JSON gives it back: lists for tuples, texts for keys."""
    return json.loads(json.dumps(value))


class Staging:
    """The staging folder of a run, made or taken over from an earlier attempt."""

    def __init__(self, destination: Path, record: Record, lock: Lock, access: Access, naming: Naming, restart: bool):
        """Make the folder, or take over that of an earlier attempt at the same run. Raises DestinationError if it is
        anything else, or holds a link: nothing is ever written through a link."""
        self.record = replace(record, run=as_json(record.run))
        self.destination, self.path, self.lock = destination, staging_of(destination), lock
        self._confirmed, self._naming = time.monotonic(), naming
        try:
            if self.path.is_symlink():
                raise DestinationError(f"{quoted(self.path)} is a link; the output needs that name, remove it")
            make_folder(self.path, access.folders)
            self._refuse_others(access)
            manifest = manifest_of(self.path, self.record.run, record.max_files)
            self._refuse_foreign(manifest)
            written = Written() if restart else read_done(self.path, self.record)
            self._refuse_strangers(restart)
            if restart:
                # Renamed first: after a stop halfway the name still shows that the folder may be removed.
                os.rename(self.path, discarded := _new_name_beside(destination))
                clear(discarded, naming, record.names)
                make_folder(self.path, access.folders)
                manifest = None
            self.folder = Folder(self.path, access)
            written.files |= manifest.files if manifest else {}
            self.journal = Journal(self.folder, self.record, written)
            # Without its marker the folder is no checkpoint while files are written again.
            self.folder.unlink(record.marker)
            for entry in entries_below(self.path):
                if TEMP_NAME.fullmatch(entry.name):
                    self.folder.unlink(entry.path)  # Left by a run that was killed.
        except OSError as error:
            raise target_error(self.path, error) from error

    def _refuse_others(self, access: Access) -> None:
        """Raises DestinationError for links and for entries of other users. Reduces the modes of the other entries to
        `access`."""
        status = os.stat(self.path)
        for entry in (Entry(".", status, False), *entries_below(self.path)):
            path = quoted(self.path / entry.path)
            if not (entry.is_file or entry.is_folder or entry.is_mount):
                raise DestinationError(f"{path} is neither file nor folder, and nothing is written through a link; "
                                       f"remove it")
            if entry.status.st_uid != self.lock.uid:
                raise DestinationError(f"{path} belongs to user {entry.status.st_uid}, and new files here to user "
                                       f"{self.lock.uid}; files of another user are not used, move it away")
            allowed = access.folders if entry.is_folder else access.files
            if entry.status.st_mode & 0o077 & ~allowed:
                with suppress(OSError):  # A file system without modes.
                    os.chmod(self.path / entry.path, stat.S_IMODE(entry.status.st_mode) & (0o7700 | allowed))

    def _refuse_foreign(self, manifest: Manifest | None) -> None:
        """Raises DestinationError for a folder that no run of this tool has left."""
        # A run that was stopped just before its last rename leaves a manifest and no journal.
        is_ours = manifest or is_journal(self.path / JOURNAL_NAME) or self.lock.note == _identity(self.path)
        if not is_ours and not all(TEMP_NAME.fullmatch(path.name) for path in self.path.iterdir()):
            raise DestinationError(f"{quoted(self.path)} was not left by an interrupted run; the output needs that "
                                   f"name, move it away")

    def _refuse_strangers(self, restart: bool) -> None:
        """Raises DestinationError for mount points, and for files that no run of this tool has written."""
        for entry in strangers(self.path, self._naming, self.record.names):
            if restart or entry.is_mount:
                raise stranger_error(self.path, entry, "--restart would remove it" if restart else
                                     "the output grows around it")
            raise DestinationError(f"{quoted(self.path / entry.path)} was not written by this run; move it away and "
                                   f"run the same command again")

    def refuse_immovable(self) -> None:
        """Raises DestinationError if the destination will be replaced and overlayfs cannot rename it, since it is in a
        lower layer. The trial renames it onto the staging folder, which always fails, as that is not empty; overlayfs
        reports EXDEV first."""
        if self.destination.is_dir() and file_system_of(self.destination.parent) == "overlay":
            try:
                os.rename(self.destination, self.path)
            except OSError as error:
                if error.errno == errno.EXDEV:
                    raise target_error(self.destination, error) from error

    def confirm(self) -> None:
        """Raises LockedError if the run has lost its lock, ResourceError if it has lost its folder."""
        is_there = self.folder.is_there()
        self.lock.confirm()  # Raises first, as a lost lock explains a lost folder.
        if not is_there:
            raise ResourceError(f"{quoted(self.path)} has vanished, or another folder was put in its place; nothing "
                                f"was committed, run the same command again")
        self._confirmed = time.monotonic()

    def confirm_at_times(self) -> None:
        """Call `confirm` if the last call is more than `CONFIRM_SECONDS` ago."""
        if time.monotonic() - self._confirmed > CONFIRM_SECONDS:
            self.confirm()

    def write(self, name: str, content: BinaryIO, check: Callable[[], None], mode: int = 0o666) -> FileDone:
        """Write a document or companion durably; after an I/O error once more. `mode`: most permission bits. `check` is
        called before each piece."""
        self.confirm()
        try:
            return self._written(name, content, check, mode)
        except WriteFault:
            content.seek(0)
            return self._written(name, content, check, mode)

    def _written(self, name: str, content: BinaryIO, check: Callable[[], None], mode: int) -> FileDone:
        with NewFile(self.folder, name, mode=mode) as file:
            offset = 0
            while piece := content.read(COPY_NBYTES):
                check()
                file.write(offset, [piece])
                offset += len(piece)
            return FileDone(name, offset, file.commit())

    def sync(self) -> None:
        """Make the names of all folders below durable, and of the files at the top. Jobs sync those of tensor
        files."""
        try:
            folders = [entry.path for entry in entries_below(self.path) if entry.is_folder]
        except OSError as error:
            raise target_error(self.path, error) from error
        sync_names(self.folder, [JOURNAL_NAME, *folders])

    def close(self) -> None:
        """Close journal and folder; the files stay."""
        self.journal.close()
        self.folder.close()

    def mark_failed(self) -> None:
        """Make the folder unusable: remove marker and manifest, note the failure in the journal."""
        self.confirm()
        self.folder.unlink(self.record.marker)
        self.folder.unlink(MANIFEST_NAME)
        self.journal.fail()

    def deliver(self, overwrite: bool, sizes: Mapping[str, int]) -> None:
        """Rename the folder to the destination, if it holds exactly the files of `sizes` (bytes by path). With
        `overwrite` an existing destination is replaced: in one step if the file system can swap two names, else it is
        absent between two renames. A note in the lock file identifies the new folder before its journal is removed.

        Raises LockedError or ResourceError, with the destination unchanged, if the run has lost its lock, the folder or
        a file in it."""
        self.confirm()
        self.lock.write_note(_identity(self.path))
        self.journal.remove()
        sync_folder(".", self.folder)
        self._refuse_incomplete(sizes)
        self.confirm()  # As close before the rename as possible.
        if overwrite and self.destination.exists():
            self._replace()
        else:
            os.rename(self.path, self.destination)
        sync_folder(self.destination.parent)

    def _refuse_incomplete(self, sizes: Mapping[str, int]) -> None:
        """Raises the first fault, preferably of a lost file. The folder then has a journal and no marker, as that of an
        interrupted run."""
        try:
            fault = max(faults(self.path, sizes), key=lambda fault: fault.severity, default=None)
        except FileNotFoundError:
            fault = None  # The folder itself was removed, as `confirm` will report.
        if fault:
            self.confirm()
            self.folder.unlink(self.record.marker)
            self.journal.begin()
            raise type(fault)(f"{fault}; nothing was committed")

    def _replace(self) -> None:
        replaced = _new_name_beside(self.destination)
        if exchange(self.path, self.destination):
            os.rename(self.path, replaced)
            return
        os.rename(self.destination, replaced)
        try:
            os.rename(self.path, self.destination)
        except OSError:
            os.rename(replaced, self.destination)
            raise


def _identity(folder: Path) -> list[int]:
    return [folder.stat().st_ino]  # Without the device, whose number changes with a reboot.


def was_swapped(destination: Path, note: list[int] | None) -> bool:
    """True if the destination is the new folder in the note of a stopped run. A staging folder beside it is then the
    old destination."""
    return note is not None and destination.is_dir() and _identity(destination) == note[-1:]


def old_beside(destination: Path, is_swapped: bool) -> tuple[Path, ...]:
    """Old checkpoints, under other names, that the one at `destination` has replaced."""
    return (*([staging_of(destination)] if is_swapped and staging_of(destination).exists() else ()),
            *replaced_beside(destination))


def clear_old(destination: Path, is_swapped: bool, naming: Naming) -> tuple[Path, ...]:
    """Remove the own entries of `old_beside`; returns the folders that remain."""
    for path in old_beside(destination, is_swapped):
        clear(path, naming)
    return old_beside(destination, is_swapped)
