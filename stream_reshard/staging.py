"""The staging folder `DST.partial`: where the destination grows, and how it becomes the destination.

It holds a journal while files are missing, and a manifest once all are there; either says which run it belongs to.
"""
from __future__ import annotations

import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from stream_reshard.durable import (
    TEMP_NAME, NewFile, WriteFault, exchange, make_folder, sync_folder, sync_folders, target_error)
from stream_reshard.errors import DestinationError, SourceError, quoted
from stream_reshard.journal import JOURNAL_NAME, Journal, is_journal
from stream_reshard.manifest import MANIFEST_NAME, MAX_FILE_NBYTES, FileDone, Manifest, read_manifest, same_run
from stream_reshard.small_files import files_below

SUFFIX_NBYTES = len("..0123456789ab.replaced")
"""By how much the longest name that is put beside a destination is longer than its own."""

COPY_NBYTES = 2**20
"""Files that are copied pass in pieces of this size: a tokenizer can be larger than the memory that is left."""


def staging_of(destination: Path) -> Path:
    """The sibling folder in which the destination grows."""
    return destination.with_name(destination.name + ".partial")


def lock_of(destination: Path) -> Path:
    """The sibling file that says who writes."""
    return destination.with_name(destination.name + ".partial.lock")


def _new_name_beside(destination: Path) -> Path:
    """Where something goes that is to be removed."""
    return destination.with_name(f".{destination.name}.{os.urandom(6).hex()}.replaced")


def replaced_beside(destination: Path) -> Iterator[Path]:
    """What was to be removed, and a stopped run did not come to it."""
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
    right size. None for anything else."""
    manifest = _manifest_of(folder, run, max_files)
    if manifest is None:
        return None
    found = {path: (folder / path).lstat().st_size for path in files_below(folder, DestinationError)
             if path != MANIFEST_NAME}
    return manifest if found == {path: file.nbytes for path, file in manifest.files.items()} else None


def _as_json(value: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(value))


class Staging:
    """The staging folder of a run. The caller holds the destination's lock."""

    def __init__(self, destination: Path, run: Mapping[str, Any], max_files: int, marker: str, restart: bool):
        """Make the folder, or take up what an earlier attempt at the same run left. Raises DestinationError for
        anything else that stands there, and for links in it: nothing is ever written through one. `marker` is the
        file whose presence makes a folder a checkpoint; it is written last."""
        self.marker = marker
        self.destination, self.path, self.run = destination, staging_of(destination), _as_json(run)
        try:
            if self.path.is_symlink():
                raise DestinationError(f"{quoted(self.path)} is a link; the output grows there, remove it")
            make_folder(self.path)
            self._refuse_links()
            # A run that was stopped just before its last rename has left a manifest and no journal.
            manifest = _manifest_of(self.path, self.run, max_files)
            if not (manifest or is_journal(self.path / JOURNAL_NAME)) and any(self.path.iterdir()):
                raise DestinationError(f"{quoted(self.path)} was not left by an interrupted run; the output grows "
                                       f"there, move it away")
            if restart:
                # Renamed first: a stop halfway through would leave a folder that nothing shows to be ours.
                os.rename(self.path, discarded := _new_name_beside(destination))
                shutil.rmtree(discarded)
                make_folder(self.path)
                manifest = None
            self.journal = Journal(self.path, self.run, max_files)
            self.journal.done |= manifest.files if manifest else {}
            # Files may be written anew, and until they are this is no checkpoint.
            (self.path / self.marker).unlink(missing_ok=True)
            self._remove_temps()
        except OSError as error:
            raise target_error(self.path, error) from error

    def _refuse_links(self) -> None:
        for path in files_below(self.path, DestinationError):
            if not stat.S_ISREG((self.path / path).lstat().st_mode):
                raise DestinationError(f"{quoted(self.path / path)} is a link or no file at all, and nothing is "
                                       f"written through those; remove it")

    def _remove_temps(self) -> None:
        for path in files_below(self.path, DestinationError):
            if TEMP_NAME.fullmatch(path.rpartition("/")[2]):
                (self.path / path).unlink()  # Left by a run that was killed.

    def write(self, name: str, content: BinaryIO, check: Callable[[], None]) -> FileDone:
        """Write a file beside the weights, durably, and once more after an I/O error; `check` is called between
        pieces."""
        try:
            return self._written(name, content, check)
        except WriteFault:
            content.seek(0)
            return self._written(name, content, check)

    def _written(self, name: str, content: BinaryIO, check: Callable[[], None]) -> FileDone:
        with NewFile(self.path / name) as file:
            offset = 0
            while piece := content.read(COPY_NBYTES):
                check()
                file.write(offset, [piece])
                offset += len(piece)
            return FileDone(name, offset, file.commit())

    def sync(self) -> None:
        """Make every name below durable: those of folders, and of files at the top. Those of tensor files are since
        their job is done (`jobs`)."""
        sync_folders(Path(folder) for folder, folders, _ in os.walk(self.path) if folders or folder == str(self.path))

    def refuse_strangers(self, expected: Collection[str]) -> None:
        """Raises DestinationError where a file stands there that this run did not write: it would be committed."""
        known = {*expected, JOURNAL_NAME, MANIFEST_NAME, self.marker}
        for path in files_below(self.path, DestinationError):
            if path not in known:
                raise DestinationError(f"{quoted(self.path / path)} was not written by this run; move it away and run "
                                       f"the same command again, or --restart")

    def disown(self) -> None:
        """What is here must never become the destination: no marker, and nothing to take up again."""
        (self.path / self.marker).unlink(missing_ok=True)
        (self.path / MANIFEST_NAME).unlink(missing_ok=True)
        self.journal.fail()

    def deliver(self, overwrite: bool, note: Callable[[list[int]], None]) -> None:
        """Rename the folder to the destination. With `overwrite` one that is there already is replaced: in the same
        step where the file system can swap two names, else it is missing between two renames. `note` keeps beforehand
        which folder is the new one."""
        self.journal.remove()
        sync_folder(self.path)
        if overwrite and self.destination.exists():
            note(_identity(self.path))
            replaced = _new_name_beside(self.destination)
            if exchange(self.path, self.destination):
                os.rename(self.path, replaced)
            else:
                os.rename(self.destination, replaced)
                try:
                    os.rename(self.path, self.destination)
                except OSError:
                    os.rename(replaced, self.destination)
                    raise
        else:
            os.rename(self.path, self.destination)
        sync_folder(self.destination.parent)


def _identity(folder: Path) -> list[int]:
    status = folder.stat()
    return [status.st_dev, status.st_ino]


def was_swapped(destination: Path, note: list[int] | None) -> bool:
    """Whether the destination is the new folder that the note of a stopped run tells of. What stands in the staging
    folder, if anything, is the old one then."""
    return note is not None and destination.is_dir() and _identity(destination) == note


def clear_old(destination: Path, is_swapped: bool) -> tuple[Path, ...]:
    """Remove old checkpoints that the finished one at `destination` has replaced; returns those that remain."""
    old = [staging_of(destination)] if is_swapped and staging_of(destination).exists() else []
    for path in [*old, *replaced_beside(destination)]:
        shutil.rmtree(path, ignore_errors=True)
    return tuple(path for path in [*old, *replaced_beside(destination)] if path.exists())
