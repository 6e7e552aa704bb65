"""The staging folder and the commit: the destination is there whole, or not at all.

The output grows in `DST.partial`, beside a journal of finished files and the plan's digest. At the end the folders are
synced, the small files written (`model_config.json` last: Nanotron takes a folder that holds it for a checkpoint), and
the folder is renamed to DST.
"""
from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from stream_reshard import engines
from stream_reshard.errors import DestinationError, SourceError, quoted
from stream_reshard.jobs import FileDone, run_job
from stream_reshard.plan import Job, Plan
from stream_reshard.tensor_file import sync_folder, target_error

JOURNAL_NAME = "stream_reshard.journal"
MANIFEST_NAME = "stream_reshard.json"
MARKER_NAME = "model_config.json"
"""The file whose presence makes a folder a checkpoint to Nanotron; written last."""


def staging_of(destination: Path) -> Path:
    """The sibling folder in which the destination grows."""
    return destination.with_name(destination.name + ".partial")


class Journal:
    """The finished files of an unfinished run: one JSON line each, below a line that says which run it is."""

    def __init__(self, staging: Path, run: Mapping[str, Any]):
        """Open or begin the journal of `run`, the plan's digest and the source's identities: files cut from another
        source would be mixed in without a trace. Raises DestinationError where another run stands in the folder."""
        self.path = staging / JOURNAL_NAME
        self.done: dict[str, FileDone] = {}
        records = self._records()
        if not records and any(path != self.path for path in staging.iterdir()):
            raise DestinationError(f"{quoted(staging)} was not left by an interrupted run; remove it, or --restart")
        if records and records[0] != run:
            raise DestinationError(f"{quoted(staging)} was left by a run with another plan or source; finish that one, "
                                   f"or --restart to throw it away")
        for record in records[1:]:
            file = staging / record["path"]
            if file.is_file() and file.stat().st_size == record["nbytes"]:
                self.done[record["path"]] = FileDone(**record)
        self._stream = open(self.path, "a", encoding="utf-8")
        if not self._stream.tell():
            self._append(run)

    def _records(self) -> list[dict[str, Any]]:
        """The whole lines, after dropping the one that a stop cut off: what it would have said is done again."""
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines()
        records = []
        for line in lines:
            try:
                records.append(json.loads(line))
            except ValueError:
                break
        if len(records) < len(lines):
            self.path.write_text("".join(line + "\n" for line in lines[:len(records)]), encoding="utf-8")
        return records

    def _append(self, record: Mapping[str, Any]) -> None:
        self._stream.write(json.dumps(record) + "\n")
        self._stream.flush()

    def add(self, file: FileDone) -> None:
        """Note a file that is durable under its final name."""
        self.done[file.path] = file
        self._append(vars(file))

    def close(self) -> None:
        """Close the stream; the file stays until the commit."""
        self._stream.close()


def run(plan: Plan, destination: Path, documents: Mapping[str, bytes], copies: Mapping[str, Path],
        identities: Mapping[str, list[int]], block_nbytes: int, executor: Executor | None,
        restart: bool, progress: Callable[[Job], None]) -> None:
    """Write the destination of a plan: all jobs, then the small files, then the commit.

    `documents` are small files by name; `copies` are files to copy, by name; `identities` are the source files as the
    plan saw them (`identity_of`). Raises SourceError, without committing, where one of those changed.
    """
    staging = staging_of(destination)
    try:
        if restart and staging.exists():
            shutil.rmtree(staging)
        staging.mkdir(parents=True, exist_ok=True)
        journal = Journal(staging, {"plan": plan.digest, "source": dict(identities)})
    except OSError as error:
        raise target_error(staging, error) from error
    try:
        todo = []
        for job in plan.jobs:
            if all(file.path in journal.done for file in job.files):
                progress(job)
            else:
                todo.append(job)
        for job, done in engines.run_all(partial(run_job, plan, staging, block_nbytes), todo, executor):
            for file in done:
                journal.add(file)
            progress(job)
    finally:
        journal.close()
    check_identities(plan.source.root, identities)
    try:
        _commit(plan, staging, destination, documents, copies, identities, journal.done)
    except OSError as error:
        raise target_error(destination, error) from error


def _commit(plan: Plan, staging: Path, destination: Path, documents: Mapping[str, bytes], copies: Mapping[str, Path],
            identities: Mapping[str, list[int]], done: Mapping[str, FileDone]) -> None:
    for name, source in copies.items():
        with open(source, "rb") as stream:
            _write_durably(staging / name, stream)
    for name, text in documents.items():
        if name != MARKER_NAME:
            _write_durably(staging / name, io.BytesIO(text))
    manifest = {"tool": "stream_reshard", "plan_sha256": plan.digest, "source": str(plan.source.root),
                "source_identities": dict(identities), "ignored_tensors": dict(plan.source.ignored),
                "files": {file.path: {"nbytes": file.nbytes, "xxh3_128": file.xxh3_128}
                          for file in sorted(done.values(), key=lambda file: file.path)}}
    _write_durably(staging / MANIFEST_NAME, io.BytesIO(json.dumps(manifest, indent=1).encode() + b"\n"))
    expected = {file.path for file in plan.target.files}
    for path in staging.rglob("*.part"):
        if path.relative_to(staging).as_posix() not in expected:
            path.unlink()  # Left by a run that was killed.
    for folder in sorted(path for path in staging.rglob("*") if path.is_dir()):
        sync_folder(folder)
    sync_folder(staging)
    _write_durably(staging / MARKER_NAME, io.BytesIO(documents[MARKER_NAME]))
    sync_folder(staging)
    os.rename(staging, destination)
    sync_folder(destination.parent)
    # Only now: a run that stops before the rename goes on from its journal.
    (destination / JOURNAL_NAME).unlink()
    sync_folder(destination)


def _write_durably(path: Path, content: BinaryIO) -> None:
    """Write a small file anew, in pieces: a tokenizer can be larger than the memory that is left."""
    path.unlink(missing_ok=True)
    with open(path, "xb") as stream:
        shutil.copyfileobj(content, stream, 2**20)
        stream.flush()
        os.fsync(stream.fileno())


def identity_of(path: Path) -> list[int]:
    """[device, inode, size in bytes, mtime in ns] of a file, links followed."""
    status = path.stat()
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns]


def check_identities(root: Path, identities: Mapping[str, list[int]]) -> None:
    """Raise SourceError where a source file is not the one that the plan saw."""
    for name, identity in identities.items():
        try:
            now: list[int] | None = identity_of(root / name)
        except OSError:
            now = None
        if now != identity:
            raise SourceError(f"{quoted(name)} changed during the run (size and mtime {identity[2:]} became "
                              f"{now[2:] if now else 'nothing'}); nothing was committed, run again with --restart")
