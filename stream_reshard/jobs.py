"""Running one job: move its parameters into its files, then make them durable."""
from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue

from stream_reshard.durable import WriteFault
from stream_reshard.manifest import FileDone
from stream_reshard.moving import Moved, OpenFiles, move, write_zeros
from stream_reshard.pipeline import Pipeline
from stream_reshard.plan import Job, Plan
from stream_reshard.stop import Stop
from stream_reshard.target_file import NewTensorFile, Transport
from stream_reshard.tensor_file import Identity, SourceFile, digest_of


MAX_OPEN_SOURCES = 4
"""Source files that one turn keeps open."""


class Turn:
    """The right to move bytes, with what is used for it: a pipeline, and the source files that are open. They stay open
    from job to job, because the kernel reads ahead of a descriptor that is read in order."""

    def __init__(self, block_nbytes: int):
        self.pipeline = Pipeline(block_nbytes)
        self._open: OrderedDict[str, SourceFile] = OrderedDict()

    def source(self, path: str, work: Work) -> SourceFile:
        """A source file, opened if it is not; of several the last few stay open."""
        if path not in self._open:
            root = work.plan.source.root
            self._open[path] = SourceFile(root, path, work.identities.get(path), work.transport.is_mapped)
        self._open.move_to_end(path)
        return self._open[path]

    def close_sources(self, num_left: int = 0) -> None:
        """Close the source files that were used longest ago."""
        while len(self._open) > num_left:
            self._open.popitem(last=False)[1].close()


class Turns:
    """Who may move bytes: a job takes a turn, and returns it before it waits for the disk (fsync), so that another one
    can use the time. Shared by all threads; another process has turns of its own."""

    def __init__(self, num_turns: int, block_nbytes: int):
        """`block_nbytes`: size of one buffer."""
        self._made_of = num_turns, block_nbytes
        self._all = [Turn(block_nbytes) for _ in range(num_turns)]
        self._free: SimpleQueue[Turn] = SimpleQueue()
        for turn in self._all:
            self._free.put(turn)

    def __reduce__(self) -> tuple[type[Turns], tuple[int, int]]:
        return Turns, self._made_of

    @contextmanager
    def taken(self) -> Iterator[Turn]:
        """Wait for a turn, and hold it."""
        turn = self._free.get()
        try:
            yield turn
        finally:
            turn.close_sources(MAX_OPEN_SOURCES)
            self._free.put(turn)

    def close(self) -> None:
        """Close all source files, and let the assistants go."""
        for turn in self._all:
            turn.close_sources()
            turn.pipeline.close()


@dataclass(frozen=True)
class Work:
    """What every job of a run needs to know. Picklable."""

    plan: Plan
    staging: Path
    """The folder under which the files grow."""
    turns: Turns
    identities: Mapping[str, Identity]
    """The source files as the plan saw them, by path."""
    done: Mapping[str, FileDone] = field(default_factory=dict)
    """Files that the journal of an earlier attempt names, by path."""
    stop: Stop = field(default_factory=Stop)
    transport: Transport = Transport()


@dataclass(frozen=True)
class JobDone:
    """The files of a job, all durable."""

    files: tuple[FileDone, ...]
    was_kept: bool
    """Whether an earlier attempt had written them."""
    moved: Moved = Moved()


def run_job(work: Work, job: Job) -> JobDone:
    """Write the files of one job, unless all are there as the journal says; returns them with their digests.

    After an I/O error in a file of the destination the job is run once more: the kernel may
    have dropped what was written, and only the source can give it back.
    """
    if kept := _kept(work, job):
        return JobDone(kept, True)
    try:
        return _written(work, job)
    except WriteFault:
        return _written(work, job)


def _kept(work: Work, job: Job) -> tuple[FileDone, ...]:
    """The files of a job as an earlier attempt left them, read and compared with its journal; () where one differs, or
    has no digest to be compared with."""
    found = []
    for file in job.files:
        done, path = work.done.get(file.path), work.staging / file.path
        if not (done and path.is_file() and path.stat().st_size == done.nbytes == file.nbytes and done.xxh3_128):
            return ()
        with work.turns.taken() as turn:
            if digest_of(work.staging, file.path, turn.pipeline.scratch, work.stop) != done.xxh3_128:
                return ()
        found.append(done)
    return tuple(found)


def _written(work: Work, job: Job) -> JobDone:
    plan, moved = work.plan, Moved()
    with ExitStack() as stack:
        with work.turns.taken() as turn:
            targets = {file.path: stack.enter_context(NewTensorFile(work.staging, file, work.transport))
                       for file in job.files}
            with turn.pipeline.used() as pipeline:
                for name in job.parameters:
                    held = plan.source.slices[name]
                    sources = {part.tensor.file: turn.source(part.tensor.file, work) for part in held}
                    files = OpenFiles(sources, targets, pipeline, work.stop)
                    moved += move(held, plan.targets_of(job, name), files)
                    for fill in plan.target.fills.get(name, ()):
                        write_zeros(fill, files)
            for target in targets.values():
                target.complete(pipeline.scratch)
        done = [FileDone(path, target.nbytes, target.commit()) for path, target in targets.items()]
    shared = sum(target.shared_nbytes for target in targets.values())
    return JobDone(tuple(done), False, moved.with_shared(shared))
