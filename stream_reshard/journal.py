"""The journal: which files an unfinished run has written. A JSON line each, below one that says which run it is."""
from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stream_reshard.durable import sync_folder, target_error, write_all
from stream_reshard.errors import DestinationError, quoted
from stream_reshard.manifest import MAX_FILE_NBYTES, FileDone, same_run
from stream_reshard.small_files import open_regular

JOURNAL_NAME = "stream_reshard.journal"

SYNC_SECONDS = 5.0
"""A power cut costs the work of this time at most: files that the journal does not name are written again."""


MAX_FIRST_LINE_NBYTES = 2**24
"""What a run is, with the identities of its source files, is shorter."""

_FAILED = {"failed": True}
"""In place of a run: the comparison with the source found a difference."""


class Journal:
    """The journal of `run`, begun or taken up again.

    `done` maps paths to the files that it names; whether they are still what it says is for the jobs to see. Raises
    DestinationError where the folder holds another run: files cut from another source would be mixed without a trace.
    """

    def __init__(self, staging: Path, run: Mapping[str, Any], max_files: int):
        self.path = staging / JOURNAL_NAME
        self._end, records = _whole_lines(self.path, (max_files + 8) * MAX_FILE_NBYTES)
        if records and records[0] == _FAILED:
            raise DestinationError(f"{quoted(staging)} failed its comparison with the source; --restart writes it anew")
        if records and not same_run(records[0], run):
            raise DestinationError(f"{quoted(staging)} was left by a run with another plan or source; finish that one, "
                                   f"or --restart to throw it away")
        self.done: dict[str, FileDone] = {}
        for record in records[1:]:
            try:
                self.done[record["path"]] = FileDone.parsed(record)
            except (ValueError, TypeError, KeyError):
                continue  # Not whole: what it would have said is done again.
        try:
            self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            os.ftruncate(self._descriptor, self._end)
            if not records:
                self._append(run)
            self._sync()
            sync_folder(staging)
        except OSError as error:
            raise target_error(self.path, error) from error

    def _append(self, record: Mapping[str, Any]) -> None:
        line = json.dumps(record).encode() + b"\n"
        write_all(self._descriptor, line, self._end)
        self._end += len(line)

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
        self._end = 0
        self._append(_FAILED)
        os.ftruncate(self._descriptor, self._end)
        self._sync()

    def remove(self) -> None:
        """Close the file and take it away: the manifest says as much once it is there."""
        self.close()
        self.path.unlink(missing_ok=True)


def is_journal(path: Path) -> bool:
    """Whether a file is what a run of this tool has left: a record of a run first, or the torn beginning of one."""
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


def _whole_lines(path: Path, max_nbytes: int) -> tuple[int, list[Any]]:
    """(bytes, records) of the lines before the first that a stop or a power cut left torn."""
    records: list[Any] = []
    end = 0
    if os.path.lexists(path):
        if not is_journal(path):
            raise DestinationError(f"{quoted(path)} is not a journal of this tool; remove it")
        if path.stat().st_size > MAX_FIRST_LINE_NBYTES + max_nbytes:
            raise DestinationError(f"{quoted(path)} is longer than any journal of this run; --restart throws it away")
        with open_regular(path) as stream:
            for line in stream:
                try:
                    record = json.loads(line) if line.endswith(b"\n") else None
                except (ValueError, RecursionError):
                    break
                if not isinstance(record, dict):
                    break
                records.append(record)
                end += len(line)
    return end, records
