"""Running one job: move its parameters into its files, then make them and their names durable."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial

from stream_reshard.destination.manifest import FileDone
from stream_reshard.machine.stop import Stop
from stream_reshard.plan.plan import Job, Plan
from stream_reshard.run.lanes import Lane, Writing
from stream_reshard.run.moving import Moved, OpenFiles, move, write_zeros
from stream_reshard.storage.durable import sync_names
from stream_reshard.storage.folder import Folder
from stream_reshard.storage.header import TensorFile
from stream_reshard.storage.identity import Identity
from stream_reshard.storage.shared_file import FilePart, SharedFile, crcs_of
from stream_reshard.storage.source_file import SourceFile, digest_of
from stream_reshard.storage.target_file import NewTensorFile, Transport


@dataclass(frozen=True)
class Work:
    """Facts that every job of a run needs. Picklable."""

    plan: Plan
    staging: Folder
    """The folder under which the files grow."""
    block_nbytes: int
    """Size of one buffer of a lane."""
    identities: Mapping[str, Identity]
    """The source files as the plan saw them, by path."""
    done: Mapping[str, FileDone] = field(default_factory=dict)
    """Files that the journal of an earlier attempt names, by path."""
    stop: Stop = field(default_factory=Stop)
    transport: Transport = Transport()
    crcs: Mapping[int, Sequence[int]] = field(default_factory=dict)
    """The CRC-32 of each tensor in the parts of files that the journal names, by the job's index."""


@dataclass(frozen=True)
class JobDone:
    """The files of a job, durable as are their names in their folders; or parts of files, which are written."""

    files: tuple[FileDone, ...]
    was_kept: bool
    """The files were written by an earlier attempt."""
    moved: Moved = Moved()
    index: int = 0
    """Position of the job in its plan."""
    crcs: tuple[int, ...] = ()
    """The CRC-32 of each tensor in parts of files, one part after the other."""


def run_job(work: Work, job: Job) -> JobDone:
    """A whole job, on a lane of its own: for an executor, which knows of no lanes."""
    with closing(Lane(work.block_nbytes)) as lane:
        return read_job(work, job, lane)()


def read_job(work: Work, job: Job, lane: Lane) -> Callable[[], JobDone]:
    """Read what a job needs, unless all its files are there as the journal says. Returns the rest of the job, which
    needs no lane: wait until the files are written, and make them durable."""
    if kept := _kept(work, job, lane.buffer()):
        return lambda: kept
    # On the way out nothing may be closed that the assistant still works with: it is waited for first.
    with ExitStack() as opened:
        targets = {file.path: opened.enter_context(_new(work, file)) for file in job.files}
        sources, writing = opened.enter_context(ExitStack()), Writing(lane)
        opened.enter_context(writing.settled())
        moved = Moved()
        for name in job.parameters:
            moved += _moved(work, name, targets, writing, sources)
        return partial(_finished, work, job, targets, writing, moved, opened.pop_all())


def _new(work: Work, file: TensorFile) -> NewTensorFile:
    if isinstance(file, FilePart):
        return SharedFile(work.staging, file)
    return NewTensorFile(work.staging, file, work.transport)


def _kept(work: Work, job: Job, buffer: memoryview) -> JobDone | None:
    """A job as an earlier attempt left it, read and compared with its journal; None where something differs, or has no
    digest to be compared with."""
    if job.index in work.crcs:
        return _kept_parts(work, job, tuple(work.crcs[job.index]), buffer)
    found = []
    for file in job.files:
        done, path = work.done.get(file.path), work.staging.path / file.path
        if not (done and path.is_file() and path.stat().st_size == done.nbytes == file.nbytes and done.xxh3_128):
            return None
        if digest_of(work.staging.path, file.path, buffer, work.stop) != done.xxh3_128:
            return None
        found.append(done)
    return JobDone(tuple(found), True, index=job.index)


def _kept_parts(work: Work, job: Job, crcs: tuple[int, ...], buffer: memoryview) -> JobDone | None:
    found: list[int] = []
    for part in job.files:
        assert isinstance(part, FilePart)
        now = crcs_of(work.staging, part, buffer, work.stop)
        if now is None or now != crcs[len(found):len(found) + len(now)]:
            return None
        found += now
    return JobDone((), True, index=job.index, crcs=crcs)


def _moved(work: Work, name: str, targets: Mapping[str, NewTensorFile], writing: Writing, sources: ExitStack) -> Moved:
    """Read one parameter and have it written. `sources` closes its source files where an error keeps the assistant from
    doing so."""
    number = work.plan.target.model.number_of(name)
    held, own = work.plan.source.slices_of(number), sources.enter_context(ExitStack())
    files = OpenFiles({path: own.enter_context(writing.lane.source(path, partial(_opened, work, path)))
                       for path in dict.fromkeys(part.tensor.file for part in held)}, targets, writing, work.stop)
    target = work.plan.target
    moved = move(held, (*target.slices_of(number), *target.copies_of(number)), files)
    for fill in target.fills_of(number):
        write_zeros(fill, files)
    writing.write(own.close, reads=False)  # A shard is cut from more files than may be open at once.
    return moved


def _finished(work: Work, job: Job, targets: Mapping[str, NewTensorFile], writing: Writing, moved: Moved,
              opened: ExitStack) -> JobDone:
    with opened:
        writing.wait()
        files, crcs = [], list[int]()
        for path, target in targets.items():
            digest = target.commit()
            if isinstance(target, SharedFile):
                crcs += target.crcs
            else:
                files.append(FileDone(path, target.nbytes, digest))
        sync_names(work.staging, [file.path for file in files])
    return JobDone(tuple(files), False, moved.corrected_by(targets.values()), job.index, tuple(crcs))


def _opened(work: Work, path: str) -> SourceFile:
    return SourceFile(work.plan.source.root, path, work.identities.get(path), work.transport.is_mapped)
