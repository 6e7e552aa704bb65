"""The staging folder `DST.partial`: where the destination grows, and how it becomes the destination.

It holds a journal while files are missing, and a manifest once all are there; either says which run it belongs to.
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
from stream_reshard.destination.journal import JOURNAL_NAME, Journal, Record, is_journal, read_done
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
"""By how much the longest name that is put beside a destination is longer than its own."""

CONFIRM_SECONDS = 1.0
"""While jobs run, a lost lock or folder is noticed within this time and a job."""

COPY_NBYTES = 2**20
"""Files that are copied pass in pieces of this size: a tokenizer can be larger than the memory that is left."""


def staging_of(destination: Path) -> Path:
    """The sibling folder in which the destination grows."""
    return destination.with_name(destination.name + ".partial")


def lock_of(destination: Path) -> Path:
    """The sibling file that says who writes."""
    return destination.with_name(destination.name + ".partial.lock")


def _new_name_beside(destination: Path) -> Path:
    """New path for something that is to be removed."""
    return destination.with_name(f".{destination.name}.{os.urandom(6).hex()}.replaced")


def replaced_beside(destination: Path) -> Iterator[Path]:
    """Paths that a stopped run was to remove, and did not."""
    pattern = re.compile(rf"\.{re.escape(destination.name)}\.[0-9a-f]{{12}}\.replaced")
    beside = destination.parent.iterdir() if os.path.isdir(destination.parent) else ()
    return (path for path in beside if pattern.fullmatch(path.name))


def _manifest_of(folder: Path, run: Mapping[str, Any], max_files: int) -> Manifest | None:
    """The manifest of a folder, if it is that of this run; None for anything else."""
    try:
        manifest = read_manifest(folder, max_files * MAX_FILE_NBYTES)
    except SourceError:
        return None
    return manifest if manifest is not None and same_run(manifest.run, run) else None


def finished(folder: Path, run: Mapping[str, Any], max_files: int) -> Manifest | None:
    """The manifest of a folder that is the finished output of this very run: all its files are there, each of the
    right size. None for anything else. Raises DestinationError where a folder in it may not be read."""
    manifest = _manifest_of(folder, run, max_files)
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


def _as_json(value: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(value))


def num_kept_in(destination: Path, record: Record) -> int:
    """Number of files that an earlier attempt at this run has left in the staging folder, as its journal names them.
    Raises DestinationError where it holds another run, or one that failed."""
    staging = staging_of(destination)
    if not staging.is_dir():
        return 0
    record = replace(record, run=_as_json(record.run))
    try:
        manifest = _manifest_of(staging, record.run, record.max_files)
        return len(manifest.files if manifest else read_done(staging, record))
    except OSError as error:
        raise target_error(staging, error) from error


class Staging:
    """The staging folder of a run."""

    def __init__(self, destination: Path, record: Record, lock: Lock, access: Access, naming: Naming, restart: bool):
        """Make the folder, or take up what an earlier attempt at the same run left. Raises DestinationError for
        anything else that stands there, and for links in it: nothing is ever written through one."""
        self.record = replace(record, run=_as_json(record.run))
        self.destination, self.path, self.lock = destination, staging_of(destination), lock
        self._confirmed, self._naming = time.monotonic(), naming
        try:
            if self.path.is_symlink():
                raise DestinationError(f"{quoted(self.path)} is a link; the output grows there, remove it")
            make_folder(self.path, access.folders)
            self._refuse_others(access)
            manifest = _manifest_of(self.path, self.record.run, record.max_files)
            self._refuse_foreign(manifest)
            done = {} if restart else read_done(self.path, self.record)
            self._refuse_strangers(restart)
            if restart:
                # Renamed first: a stop halfway through would leave a folder that nothing shows to be ours.
                os.rename(self.path, discarded := _new_name_beside(destination))
                clear(discarded, naming, record.names)
                make_folder(self.path, access.folders)
                manifest = None
            self.folder = Folder(self.path, access)
            self.journal = Journal(self.folder, self.record, done | dict(manifest.files if manifest else {}))
            # Files may be written anew, and until they are this is no checkpoint.
            self.folder.unlink(record.marker)
            for entry in entries_below(self.path):
                if TEMP_NAME.fullmatch(entry.name):
                    self.folder.unlink(entry.path)  # Left by a run that was killed.
        except OSError as error:
            raise target_error(self.path, error) from error

    def _refuse_others(self, access: Access) -> None:
        """Raises DestinationError for links and for what another user has put there; takes from what is there what the
        source does not let others do."""
        status = os.stat(self.path)
        for entry in (Entry(".", status, False), *entries_below(self.path)):
            path = quoted(self.path / entry.path)
            if not (entry.is_file or entry.is_folder or entry.is_mount):
                raise DestinationError(f"{path} is a link or no file at all, and nothing is written through those; "
                                       f"remove it")
            if entry.status.st_uid != self.lock.uid:
                raise DestinationError(f"{path} belongs to user {entry.status.st_uid}, and files made here to "
                                       f"{self.lock.uid}; what another user has prepared is not taken up, move it away")
            allowed = access.folders if entry.is_folder else access.files
            if entry.status.st_mode & 0o077 & ~allowed:
                with suppress(OSError):  # A file system without modes.
                    os.chmod(self.path / entry.path, stat.S_IMODE(entry.status.st_mode) & (0o7700 | allowed))

    def _refuse_foreign(self, manifest: Manifest | None) -> None:
        """Raises DestinationError for a folder that no run has left."""
        # A run that was stopped just before its last rename has left a manifest and no journal.
        is_ours = manifest or is_journal(self.path / JOURNAL_NAME) or self.lock.note == _identity(self.path)
        if not is_ours and not all(TEMP_NAME.fullmatch(path.name) for path in self.path.iterdir()):
            raise DestinationError(f"{quoted(self.path)} was not left by an interrupted run; the output grows there, "
                                   f"move it away")

    def _refuse_strangers(self, restart: bool) -> None:
        """Raises DestinationError for files in the folder that no run has written, and for mount points."""
        for entry in strangers(self.path, self._naming, self.record.names):
            if restart or entry.is_mount:
                raise stranger_error(self.path, entry, "--restart would take it away" if restart else
                                     "the output grows around it")
            raise DestinationError(f"{quoted(self.path / entry.path)} was not written by this run; move it away and "
                                   f"run the same command again")

    def refuse_immovable(self) -> None:
        """Raises DestinationError where a destination that is to be replaced cannot be renamed: overlayfs keeps folders
        of its lower layers where they are. The trial does nothing, as no folder is renamed onto one that is not empty;
        the kernel's overlayfs says before that whether it ever would."""
        if self.destination.is_dir() and file_system_of(self.destination.parent) == "overlay":
            try:
                os.rename(self.destination, self.path)
            except OSError as error:
                if error.errno == errno.EXDEV:
                    raise target_error(self.destination, error) from error

    def confirm(self) -> None:
        """Raises LockedError where the run has lost its lock, ResourceError where its folder is not there any more."""
        is_there = self.folder.is_there()
        self.lock.confirm()
        if not is_there:
            raise ResourceError(f"{quoted(self.path)} has vanished, or another folder was put in its place; nothing "
                                f"was committed, run the same command again")
        self._confirmed = time.monotonic()

    def confirm_at_times(self) -> None:
        """The same, but not more often than makes sense."""
        if time.monotonic() - self._confirmed > CONFIRM_SECONDS:
            self.confirm()

    def write(self, name: str, content: BinaryIO, check: Callable[[], None], mode: int = 0o666) -> FileDone:
        """Write a file beside the weights, durably, of this mode at most, and once more after an I/O error; `check` is
        called between pieces."""
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
        """Let go of the folder; what is in it stays."""
        self.journal.close()
        self.folder.close()

    def mark_failed(self) -> None:
        """Make the folder unusable: remove marker and manifest, note the failure in the journal."""
        self.confirm()
        self.folder.unlink(self.record.marker)
        self.folder.unlink(MANIFEST_NAME)
        self.journal.fail()

    def deliver(self, overwrite: bool, sizes: Mapping[str, int]) -> None:
        """Rename the folder to the destination, if it holds files of these sizes in bytes and nothing else. With
        `overwrite` one that is there already is replaced: in the same step where the file system can swap two names,
        else it is missing between two renames. The lock keeps beforehand which folder is the new one: one without a
        journal, until it has its name.

        Raises LockedError or ResourceError, with the destination as it was, where the run has lost its lock, the folder
        or a file in it."""
        self.confirm()
        self.lock.write_note(_identity(self.path))
        self.journal.remove()
        sync_folder(".", self.folder)
        self._refuse_incomplete(sizes)
        self.confirm()  # Last, so that as little as can be lies between it and the rename.
        if overwrite and self.destination.exists():
            self._replace()
        else:
            os.rename(self.path, self.destination)
        sync_folder(self.destination.parent)

    def _refuse_incomplete(self, sizes: Mapping[str, int]) -> None:
        """Raises the first fault, of lost files rather than of others; the folder is then as that of a run that was
        stopped earlier."""
        try:
            fault = max(faults(self.path, sizes), key=lambda fault: fault.severity, default=None)
        except FileNotFoundError:
            fault = None  # The folder itself is gone.
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
    return [folder.stat().st_ino]  # The device's number is another one after a reboot.


def was_swapped(destination: Path, note: list[int] | None) -> bool:
    """True where the destination is the new folder that the note of a stopped run tells of. The staging folder, if
    there is one, is then the old destination."""
    return note is not None and destination.is_dir() and _identity(destination) == note[-1:]


def old_beside(destination: Path, is_swapped: bool) -> tuple[Path, ...]:
    """Old checkpoints that the finished one at `destination` has replaced."""
    return (*([staging_of(destination)] if is_swapped and staging_of(destination).exists() else ()),
            *replaced_beside(destination))


def clear_old(destination: Path, is_swapped: bool, naming: Naming) -> tuple[Path, ...]:
    """Remove what is ours of them; returns those that remain."""
    for path in old_beside(destination, is_swapped):
        clear(path, naming)
    return old_beside(destination, is_swapped)
