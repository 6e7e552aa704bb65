"""The run of a plan: jobs, then the files beside the weights, then the commit. The destination is there whole, or not.

Order at the end: companions and documents, manifest, folders synced, the marker (the config that makes a folder a
checkpoint to its readers), a check if one is asked for, the journal away, one rename.
"""
from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

import xxhash

from stream_reshard.destination.access import access_to, access_to_replaced
from stream_reshard.destination.lock import Lock
from stream_reshard.destination.manifest import MANIFEST_NAME, FileDone, Manifest, with_files
from stream_reshard.destination.refusals import refuse_occupied
from stream_reshard.destination.staging import Staging, clear_old, lock_of, old_beside, was_swapped
from stream_reshard.errors import DestinationError, DifferenceError, SourceError, StreamReshardError, quoted
from stream_reshard.machine.stop import Stop
from stream_reshard.plan.plan import Job
from stream_reshard.run import engines
from stream_reshard.run.jobs import JobDone, Work, read_job, run_job
from stream_reshard.run.lanes import Lanes
from stream_reshard.run.moving import Moved
from stream_reshard.run.output import Output
from stream_reshard.storage.cloning import can_clone_all
from stream_reshard.storage.durable import WriteFault, make_folder, target_error
from stream_reshard.storage.folder import Access
from stream_reshard.storage.identity import Identity, changed, identity_of
from stream_reshard.storage.small_files import open_regular
from stream_reshard.storage.source_file import digest_of
from stream_reshard.storage.target_file import Transport


@dataclass(frozen=True)
class RunOptions:
    """Ways and means of a run; changes nothing of the output."""

    block_nbytes: int
    executor: Executor | None = None
    """Runs the jobs; None: the lanes of this process."""
    restart: bool = False
    """Throw away what an interrupted run left."""
    overwrite: bool = False
    """Replace a destination that is there already, once the new one is complete."""
    break_lock: bool = False
    transport: Transport = Transport()
    """Way in which bytes move; the run itself finds out whether blocks can be shared."""
    num_workers: int = 1
    """Lanes of this process: jobs that may read at the same time."""
    num_jobs: int = 8
    """Jobs under way at once: read, written, or waiting for the disk."""
    check: Callable[[Path], object] | None = None
    """Called with the finished folder before it becomes the destination; raises where it must not."""
    progress: Callable[[Job], None] = lambda job: None
    """Called with every finished job."""
    stop: Stop = field(default_factory=Stop)


@dataclass(frozen=True)
class Done:
    """Result of a run that ended well."""

    num_kept: int
    """Tensor files that an earlier attempt had written."""
    leftovers: tuple[Path, ...] = ()
    """Overwritten checkpoints that could not be removed."""
    moved: Moved = Moved()
    """Bytes of tensors that this run wrote."""
    num_digests: int = 0
    """Tensor files that the manifest has a digest of."""
    was_finished: bool = False
    """The destination was finished before."""
    num_parts_kept: int = 0
    """Parts of optimizer files that an earlier attempt had written."""

    def __add__(self, other: Done) -> Done:
        return replace(self, num_kept=self.num_kept + other.num_kept,
                       num_parts_kept=self.num_parts_kept + other.num_parts_kept, moved=self.moved + other.moved,
                       num_digests=self.num_digests + other.num_digests)


def run(output: Output, options: RunOptions) -> Done:
    """Write the destination.

    Raises SourceError, without committing, where a source file changed; LockedError where another run is at work;
    DestinationError where something stands there that may not be replaced.
    """
    destination = output.destination
    try:
        make_folder(destination.parent)
        with Lock(lock_of(destination), options.break_lock) as lock, options.stop.awaited():
            if is_swapped := was_swapped(destination, lock.note):
                clear_old(destination, is_swapped, output.naming)
                lock.write_note(None)
            manifest = output.finished()
            if manifest and not output.moved(manifest) and (is_swapped or not options.overwrite):
                _confirm(output, options, manifest)
                done = Done(output.num_files, was_finished=True)
            else:
                done = _write(output, options, lock)
            is_over = lock.is_ours()  # Else what is beside the destination may be another run's.
            leftovers = clear_old(destination, False, output.naming) if is_over else old_beside(destination, False)
            return replace(done, leftovers=leftovers)
    except OSError as error:
        raise target_error(destination, error) from error


def _confirm(output: Output, options: RunOptions, manifest: Manifest) -> None:
    """Raises DestinationError where a file of the finished destination does not have its digest any more, or one of
    states without a digest its checksums."""
    buffer = memoryview(bytearray(options.block_nbytes))
    shared = set(output.states.plan.target.paths) if output.states else set()
    for path, file in manifest.files.items():
        if file.xxh3_128:
            is_whole = digest_of(output.destination, path, buffer, options.stop) == file.xxh3_128
        else:
            is_whole = path not in shared or _is_whole(output.destination, path, buffer, options.stop)
        if not is_whole:
            raise DestinationError(f"{quoted(output.destination / path)} does not have the digest in {MANIFEST_NAME}, "
                                   f"or the checksums in itself: the conversion was complete and was damaged since; "
                                   f"--overwrite makes it anew")
    if options.check:
        options.check(output.destination)


def _is_whole(folder: Path, path: str, buffer: memoryview, stop: Stop) -> bool:
    """True for a file of states that has the checksums in it."""
    from stream_reshard.storage.torch_bytes import damage_in
    try:
        return damage_in(folder, path, buffer, stop) is None
    except SourceError:
        return False


def _write(output: Output, options: RunOptions, lock: Lock) -> Done:
    refuse_occupied(output.destination, options.overwrite, output.naming)
    access = access_to(output.shards) & access_to_replaced(output.destination)
    staging = Staging(output.destination, output.record, lock, access, output.naming, options.restart)
    try:
        staging.refuse_immovable()
        done = _run_jobs(output, options, staging)
        sizes = _add_small_files(output, options, staging)
        check_identities(output.plan.source.root, output.identities)
        check_identities(Path("/"), {str(own.path): own.identity for own in output.companions.values()})
        staging.sync()
        staging.write(output.marker, io.BytesIO(output.documents[output.marker]), options.stop.check)
        if options.check:
            _check(output, options.check, staging)
        refuse_occupied(output.destination, options.overwrite, output.naming)  # Much may have happened there since.
        staging.deliver(options.overwrite, sizes)
        return done
    finally:
        staging.close()


def _run_jobs(output: Output, options: RunOptions, staging: Staging) -> Done:
    plan = output.plan
    is_cloned = can_clone_all(plan.source.root, plan.source.paths, staging.path)
    work = Work(plan, staging.folder, options.block_nbytes, output.identities, dict(staging.journal.done),
                stop=options.stop, transport=replace(options.transport, is_cloned=is_cloned))
    with closing(Lanes(options.num_workers, options.block_nbytes, options.num_jobs)) as lanes:
        done = _run_plan(work, options, staging, lanes)
        if output.states:
            states = replace(work, plan=output.states.plan, done={}, crcs=dict(staging.journal.crcs))
            done += _run_plan(states, options, staging, lanes)
            buffer = lanes.buffer() if options.transport.digests == "all" else None
            for file in output.states.finish(staging, options.stop, buffer):
                staging.journal.add(file)
    return done


def _run_plan(work: Work, options: RunOptions, staging: Staging, lanes: Lanes) -> Done:
    """Run every job of a plan."""
    total = Done(0)

    def submit(job: Job) -> Future[JobDone]:
        if options.executor is not None:
            return options.executor.submit(run_job, work, job)
        return lanes.submit(partial(read_job, work, job))

    # After an I/O error once more: the kernel may have dropped what was written, and only the source can give it back.
    results = engines.run_all(submit, work.plan.jobs, options.stop, options.num_jobs, partial(_note, staging),
                              (WriteFault,))
    with closing(results):
        for job, done in results:
            _note(staging, done)
            total += Done(len(done.files) * done.was_kept, moved=done.moved,
                          num_digests=sum(file.xxh3_128 is not None for file in done.files),
                          num_parts_kept=len(job.files) * bool(done.was_kept and done.crcs))
            options.progress(job)
            options.stop.check()
            staging.confirm_at_times()
    return total


def _note(staging: Staging, done: JobDone) -> None:
    """Keep in the journal what a job has made durable."""
    if done.crcs and tuple(staging.journal.crcs.get(done.index, ())) != done.crcs:
        staging.journal.add_crcs(done.index, done.crcs)
    for file in done.files:
        if staging.journal.done.get(file.path) != file:
            staging.journal.add(file)


def _add_small_files(output: Output, options: RunOptions, staging: Staging) -> dict[str, int]:
    """Write the companions, the documents but for the marker, and the manifest of all of them; returns the size of
    every file that the folder will have, in bytes."""
    marker = output.documents[output.marker]
    written = [FileDone(output.marker, len(marker), xxhash.xxh3_128(marker).hexdigest())]
    for name, companion in output.companions.items():
        with _opened(companion.path) as stream:
            mode = Access.of_file(os.fstat(stream.fileno()).st_mode).files
            written.append(staging.write(name, stream, options.stop.check, mode))
    for name, text in output.documents.items():
        if name != output.marker:
            written.append(staging.write(name, io.BytesIO(text), options.stop.check))
    tensor_files = [staging.journal.done[path] for path in output.paths]
    manifest = with_files(Manifest(output.run, output.facts), [*tensor_files, *written])
    own = staging.write(MANIFEST_NAME, io.BytesIO(manifest.packed()), options.stop.check)
    return {file.path: file.nbytes for file in (*manifest.files.values(), own)}


def _opened(path: Path) -> BinaryIO:
    try:
        return open_regular(path)
    except OSError as error:
        raise SourceError(f"{quoted(path)}: {error.strerror}; nothing was committed") from error


def _check(output: Output, check: Callable[[Path], object], staging: Staging) -> None:
    """Run the check; a folder that fails it is never taken up again, unless it was the source that changed."""
    try:
        check(staging.path)
    except StreamReshardError as error:
        if error.exit_code != DifferenceError.exit_code:
            raise
        check_identities(output.plan.source.root, output.identities)
        staging.mark_failed()
        raise DifferenceError(f"{error}\n{quoted(staging.path)} was not committed; run again with --restart to write "
                              f"it anew") from error
    check_identities(output.plan.source.root, output.identities)


def check_identities(root: Path, identities: Mapping[str, Identity]) -> None:
    """Raises SourceError where a source file is not the one that the plan saw."""
    for name, identity in identities.items():
        try:
            now: Identity | None = identity_of((root / name).stat())
        except OSError:
            now = None
        if now != identity:
            raise changed(name, identity, now)
