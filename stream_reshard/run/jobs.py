"""Running one job: move its parameters into its files, then make them and their names durable."""
from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

from stream_reshard.destination.manifest import FileDone
from stream_reshard.machine.stop import Stop
from stream_reshard.plan.plan import Job, Plan
from stream_reshard.run.lanes import Lanes, Writing
from stream_reshard.run.moving import Moved, OpenFiles, move, write_zeros
from stream_reshard.storage.durable import WriteFault, sync_names
from stream_reshard.storage.folder import Folder
from stream_reshard.storage.identity import Identity
from stream_reshard.storage.source_file import SourceFile, digest_of
from stream_reshard.storage.target_file import NewTensorFile, Transport


@dataclass(frozen=True)
class Work:
    """Facts that every job of a run needs. Picklable."""

    plan: Plan
    staging: Folder
    """The folder under which the files grow."""
    lanes: Lanes
    identities: Mapping[str, Identity]
    """The source files as the plan saw them, by path."""
    done: Mapping[str, FileDone] = field(default_factory=dict)
    """Files that the journal of an earlier attempt names, by path."""
    stop: Stop = field(default_factory=Stop)
    transport: Transport = Transport()


@dataclass(frozen=True)
class JobDone:
    """The files of a job, all durable, as are their names in their folders."""

    files: tuple[FileDone, ...]
    was_kept: bool
    """The files were written by an earlier attempt."""
    moved: Moved = Moved()


def run_job(work: Work, job: Job) -> JobDone:
    """Write the files of one job, unless all are there as the journal says; returns them with their digests.

    After an I/O error in a file of the destination the job is run once more: the kernel may have dropped what was
    written, and only the source can give it back.
    """
    with work.lanes.ticket() as ticket:
        if kept := _kept(work, job, ticket):
            return JobDone(kept, True)
        try:
            return _written(work, job, ticket)
        except WriteFault:
            return _written(work, job, ticket)


def _kept(work: Work, job: Job, ticket: int) -> tuple[FileDone, ...]:
    """The files of a job as an earlier attempt left them, read and compared with its journal; () where one differs, or
    has no digest to be compared with."""
    found = []
    for file in job.files:
        done, path = work.done.get(file.path), work.staging.path / file.path
        if not (done and path.is_file() and path.stat().st_size == done.nbytes == file.nbytes and done.xxh3_128):
            return ()
        with work.lanes.taken(ticket) as lane:
            if digest_of(work.staging.path, file.path, lane.buffer(), work.stop) != done.xxh3_128:
                return ()
        found.append(done)
    return tuple(found)


def _written(work: Work, job: Job, ticket: int) -> JobDone:
    plan, moved = work.plan, Moved()
    # On the way out nothing may be closed that the assistant still works with: it is waited for first.
    with ExitStack() as opened, ExitStack() as sources, ExitStack() as settled:
        targets = {file.path: opened.enter_context(NewTensorFile(work.staging, file, work.transport))
                   for file in job.files}
        with work.lanes.taken(ticket) as lane:
            writing = Writing(lane)
            settled.enter_context(writing.settled())
            for name in job.parameters:
                number = plan.target.model.number_of(name)
                held, own = plan.source.slices_of(number), sources.enter_context(ExitStack())
                files = OpenFiles({path: own.enter_context(lane.source(path, partial(_opened, work, path)))
                                   for path in dict.fromkeys(part.tensor.file for part in held)},
                                  targets, writing, work.stop)
                moved += move(held, plan.target.slices_of(number), files)
                for fill in plan.target.fills_of(number):
                    write_zeros(fill, files)
                writing.write(own.close, reads=False)  # A shard is cut from more files than may be open at once.
        writing.wait()
        done = tuple(FileDone(path, target.nbytes, target.commit()) for path, target in targets.items())
        sync_names(work.staging, targets)
    return JobDone(done, False, moved.corrected_by(targets.values()))


def _opened(work: Work, path: str) -> SourceFile:
    return SourceFile(work.plan.source.root, path, work.identities.get(path), work.transport.is_mapped)
