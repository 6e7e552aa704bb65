"""The journal: what an unfinished run has written. One JSON line identifies the run, then one line tells of each file,
or of each job that wrote parts of files."""
from __future__ import annotations

import json
import os
import time
from array import array
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import chain, islice, starmap
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
"""Time between syncs. A power cut costs the work of this time: files that the journal does not name are written again.
"""

MAX_FIRST_LINE_NBYTES = 2**24
"""Most bytes of the line that identifies the run, with the identities of its source files."""

_JOB, _CRCS = "job", "crc32"
"""Keys of the record of a job that wrote parts of files."""

_FAILED = {"failed": True}
"""Last record of a journal after `--verify` found a difference."""

_BATCH = 1024
"""Records that are written at a time when a journal is rewritten."""


@dataclass(frozen=True)
class Record:
    """Identity of a run, and names of files that its folder will hold."""

    run: Mapping[str, Any]
    """Identity of the run, as JSON: equal for two attempts at the same output only."""
    marker: str
    """Name of the file whose presence makes a folder a checkpoint; written last."""
    names: Collection[str]
    """Files whose names follow no naming rule of the format. The journal lists them before they are written, because
    only listed files may be removed."""
    max_files: int
    """Upper limit on the number of files in the folder."""
    max_crcs: int = 0
    """Upper limit on the number of tensors in files that jobs write together."""

    @property
    def max_nbytes(self) -> int:
        """Upper limit on the length of the journal."""
        return (2 * MAX_FIRST_LINE_NBYTES + (self.max_files + 8) * MAX_FILE_NBYTES
                + self.max_crcs * len(f"{2**32 - 1}, "))


@dataclass
class Written:
    """What a run has written, by its journal."""

    files: dict[str, FileDone] = field(default_factory=dict)
    """Whole files, by path."""
    crcs: dict[int, array[int]] = field(default_factory=dict)
    """The CRC-32 of each tensor that a job wrote into files it shares with others, by the job's index."""


class Journal:
    """The journal of a run. It is always a new file, so that an earlier run that is still alive cannot add to it."""

    def __init__(self, folder: Folder, record: Record, written: Written):
        """`written`: by earlier attempts; jobs check it before they use it."""
        self.folder, self.record, self.done, self.crcs = folder, record, written.files, written.crcs
        self.path = folder.path / JOURNAL_NAME
        self._descriptor = -1
        self.begin()

    def begin(self) -> None:
        """Write the whole journal durably as a new file. Raises DestinationError or ResourceError."""
        self.close()
        temp, own = temp_name(JOURNAL_NAME), self.folder.descriptor
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            self._descriptor = os.open(temp, flags, self.folder.access.files, dir_fd=own)
            try:
                self._end = 0
                self._append(self.record.run, {"files": sorted(self.record.names), "format": FORMAT,
                                               "version": __version__})
                records = chain(map(asdict, self.done.values()), starmap(_parts, self.crcs.items()))
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
        """Add a file that is durable under its final name. Raises DestinationError or ResourceError."""
        self.done[file.path] = file
        self._add(asdict(file))

    def add_crcs(self, index: int, crcs: Sequence[int]) -> None:
        """Add the parts of files that a job has written. Raises DestinationError or ResourceError."""
        self.crcs[index] = array("I", crcs)
        self._add(_parts(index, self.crcs[index]))

    def _add(self, record: Mapping[str, Any]) -> None:
        try:
            self._append(record)
            if time.monotonic() - self._synced > SYNC_SECONDS:
                self._sync()
        except OSError as error:
            raise target_error(self.path, error) from error

    def close(self) -> None:
        """Close the descriptor; the file stays."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def fail(self) -> None:
        """Record that the folder failed its comparison, and that no run may continue it."""
        self._append(_FAILED)
        self._sync()

    def remove(self) -> None:
        """Remove the journal; from then on the manifest identifies the run."""
        self.close()
        self.folder.unlink(JOURNAL_NAME)


def _parts(index: int, crcs: array[int]) -> dict[str, Any]:
    """The record of a job that wrote parts of files."""
    return {_JOB: index, _CRCS: crcs.tolist()}


def is_journal(path: Path) -> bool:
    """True if a file begins with the record of a run, or with the torn beginning of one."""
    try:
        with open_regular(path) as stream:
            if os.fstat(stream.fileno()).st_nlink > 1:
                return False  # A write in place would change the file under its other name too.
            first = stream.readline(MAX_FIRST_LINE_NBYTES)
    except OSError:
        return False
    try:
        value = json.loads(first)
    except (ValueError, RecursionError):
        return not first.strip(b"\0") or (first.startswith(b'{"plan_sha256"'[:len(first)]) and first[-1:] != b"\n")
    return value == _FAILED or (isinstance(value, dict) and "plan_sha256" in value)


def read_done(staging: Path, record: Record) -> Written:
    """What an earlier attempt at this run has written. Raises DestinationError if the journal is of
    another run, whose files must not mix with those of this one, or of a run that failed its comparison."""
    path, done, is_first = staging / JOURNAL_NAME, Written(), True
    if not os.path.lexists(path):
        return done
    if path.stat().st_size > record.max_nbytes:
        raise DestinationError(f"{quoted(path)} is longer than any journal of this run; --restart removes it")
    for value in _records(path):
        if value == _FAILED:
            raise DestinationError(f"{quoted(staging)} failed its comparison with the source; --restart writes it anew")
        if is_first and not same_run(value, record.run):
            raise DestinationError(f"{quoted(staging)} was left by a run with another plan or source; finish that run, "
                                   f"or remove its files with --restart")
        is_first = False
        if "format" in value:
            _check_format(staging, value["format"])
        with suppress(ValueError, TypeError, KeyError, OverflowError):  # An invalid record: it is written again.
            if _JOB in value:
                done.crcs[int(value[_JOB])] = array("I", value[_CRCS])
            else:
                done.files[value["path"]] = FileDone.parsed(value)
    return done


def _check_format(staging: Path, value: Any) -> None:
    try:
        check_format(value)
    except ValueError as error:
        raise DestinationError(f"the journal in {quoted(staging)}: {error}, or --restart throws it away") from error


def names_in(path: Path) -> Iterator[str]:
    """Paths of the files that a journal names; none if the file is no journal."""
    with suppress(DestinationError):
        for value in _records(path):
            names = value.get("files", [value.get("path")])
            yield from (name for name in names if isinstance(name, str)) if isinstance(names, list) else ()


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """The records up to the first torn line, which a stop or a power cut may leave. Raises DestinationError for a file
    that is no journal."""
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
