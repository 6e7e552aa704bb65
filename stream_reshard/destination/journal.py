"""The journal: which files an unfinished run has written. A JSON line each, below one that says which run it is."""
from __future__ import annotations

import json
import os
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from stream_reshard import __version__
from stream_reshard.destination.manifest import FORMAT, MAX_FILE_NBYTES, FileDone, check_format, same_run
from stream_reshard.errors import DestinationError, quoted
from stream_reshard.storage.durable import sync_folder, target_error, temp_name, write_all
from stream_reshard.storage.folder import Folder
from stream_reshard.storage.small_files import open_regular

JOURNAL_NAME = "stream_reshard.journal"

SYNC_SECONDS = 5.0
"""A power cut costs the work of this time at most: files that the journal does not name are written again."""

MAX_FIRST_LINE_NBYTES = 2**24
"""Upper limit in bytes for the record of a run, with the identities of its source files."""

_FAILED = {"failed": True}
"""The last record where the comparison with the source found a difference."""

_BATCH = 1024
"""Records that are written at a time when a journal is taken up."""


@dataclass(frozen=True)
class Record:
    """Identity of a run, and names of the files that its folder will hold."""

    run: Mapping[str, Any]
    """Equal for two attempts at the same output, and for nothing else."""
    marker: str
    """The file whose presence makes a folder a checkpoint; written last."""
    names: Collection[str]
    """The files that Nanotron's naming rules do not name, and only the journal can: whoever removes the folder has to
    know them before they are there."""
    max_files: int
    """More files than the folder will hold."""


class Journal:
    """The journal of a run, begun or taken up again.

    `done` maps paths to the files that it names; whether they are still what it says is for the jobs to see. It is
    always a file of its own: what an earlier run that is still alive adds to its own reaches no other.
    """

    def __init__(self, folder: Folder, record: Record, done: Mapping[str, FileDone]):
        self.folder, self.record, self.done = folder, record, dict(done)
        self.path = folder.path / JOURNAL_NAME
        self._descriptor = -1
        self.begin()

    def begin(self) -> None:
        """Write it whole, under its name once it is durable. Raises as NewFile does."""
        self.close()
        temp, own = temp_name(JOURNAL_NAME), self.folder.descriptor
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            self._descriptor = os.open(temp, flags, self.folder.access.files, dir_fd=own)
            try:
                self._end = 0
                self._append(self.record.run, {"files": sorted(self.record.names), "format": FORMAT,
                                               "version": __version__})
                records = map(asdict, self.done.values())
                while batch := list(islice(records, _BATCH)):
                    self._append(*batch)
                self._sync()
                os.rename(temp, JOURNAL_NAME, src_dir_fd=own, dst_dir_fd=own)
                sync_folder(".", self.folder)
            except OSError:
                with suppress(OSError):
                    os.unlink(temp, dir_fd=own)
                raise
        except OSError as error:
            raise target_error(self.path, error) from error

    def _append(self, *records: Mapping[str, Any]) -> None:
        lines = b"".join(json.dumps(record).encode() + b"\n" for record in records)
        write_all(self._descriptor, lines, self._end)
        self._end += len(lines)

    def _sync(self) -> None:
        os.fsync(self._descriptor)
        self._synced = time.monotonic()

    def add(self, file: FileDone) -> None:
        """Note a file that is durable under its final name."""
        self.done[file.path] = file
        try:
            self._append(asdict(file))
            if time.monotonic() - self._synced > SYNC_SECONDS:
                self._sync()
        except OSError as error:
            raise target_error(self.path, error) from error

    def close(self) -> None:
        """Close the file; it stays until the commit."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def fail(self) -> None:
        """Say that what is here must never be taken up again."""
        self._append(_FAILED)
        self._sync()

    def remove(self) -> None:
        """Close the file and take it away: the manifest says as much once it is there."""
        self.close()
        self.folder.unlink(JOURNAL_NAME)


def is_journal(path: Path) -> bool:
    """True where a file was left by a run of this tool: a record of a run first, or the torn beginning of one."""
    try:
        with open_regular(path) as stream:
            if os.fstat(stream.fileno()).st_nlink > 1:
                return False  # Written in place: another name of it would change too.
            first = stream.readline(MAX_FIRST_LINE_NBYTES)
    except OSError:
        return False
    try:
        value = json.loads(first)
    except (ValueError, RecursionError):
        return not first.strip(b"\0") or (first.startswith(b'{"plan_sha256"'[:len(first)]) and first[-1:] != b"\n")
    return value == _FAILED or (isinstance(value, dict) and "plan_sha256" in value)


def read_done(staging: Path, record: Record) -> dict[str, FileDone]:
    """The files that an earlier attempt at this run has noted. Raises DestinationError where the folder holds another
    run, since files cut from another source would be mixed without a trace, or one that failed."""
    path, done, is_first = staging / JOURNAL_NAME, {}, True
    if not os.path.lexists(path):
        return {}
    if path.stat().st_size > 2 * MAX_FIRST_LINE_NBYTES + (record.max_files + 8) * MAX_FILE_NBYTES:
        raise DestinationError(f"{quoted(path)} is longer than any journal of this run; --restart throws it away")
    for value in _records(path):
        if value == _FAILED:
            raise DestinationError(f"{quoted(staging)} failed its comparison with the source; --restart writes it anew")
        if is_first and not same_run(value, record.run):
            raise DestinationError(f"{quoted(staging)} was left by a run with another plan or source; finish that one, "
                                   f"or --restart to throw it away")
        is_first = False
        if "format" in value:
            _check_format(staging, value["format"])
        with suppress(ValueError, TypeError, KeyError):  # Not whole: what it would have said is done again.
            done[value["path"]] = FileDone.parsed(value)
    return done


def _check_format(staging: Path, value: Any) -> None:
    try:
        check_format(value)
    except ValueError as error:
        raise DestinationError(f"the journal in {quoted(staging)}: {error}, or --restart throws it away") from error


def names_in(path: Path) -> Iterator[str]:
    """Paths of the files that a journal names: written, or to be written beside the weights."""
    with suppress(DestinationError):  # What is no journal names nothing.
        for value in _records(path):
            names = value.get("files", [value.get("path")])
            yield from (name for name in names if isinstance(name, str)) if isinstance(names, list) else ()


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """The records before the first line that a stop or a power cut left torn. Raises DestinationError for a file that
    is no journal."""
    if not is_journal(path):
        raise DestinationError(f"{quoted(path)} is not a journal of this tool; remove it")
    with open_regular(path) as stream:
        while (line := stream.readline(MAX_FIRST_LINE_NBYTES)).endswith(b"\n"):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                return
            if not isinstance(record, dict):
                return
            yield record
