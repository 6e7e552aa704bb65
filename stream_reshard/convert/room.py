"""Room for a run: memory, open files, and space on the disk of the destination."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

from stream_reshard.destination.refusals import disk_free, existing_parent
from stream_reshard.errors import ResourceError, StreamReshardError
from stream_reshard.machine import memory
from stream_reshard.machine.kernel import free_descriptors
from stream_reshard.options import Options
from stream_reshard.plan.alignment import cloneable_nbytes
from stream_reshard.plan.plan import Plan
from stream_reshard.run.lanes import MAX_UNUSED, NUM_BUFFERS
from stream_reshard.storage.cloning import can_clone_all

NUM_WAITING = 8
"""Number of jobs that wait for the disk while others move bytes."""

_NUM_OPEN = 8
"""Number of files open beside those of jobs: lock, journal, listed folders, modules during their import."""


def budget_of(options: Options, plans: Sequence[Plan], held: int) -> tuple[memory.MemoryPlan, list[str]]:
    """(memory of the run, remarks on it). A run keeps a record per file, and `held` bytes of documents. Without a
    destination only the plan must fit in memory, not the run's per-file records."""
    num_buffers = NUM_BUFFERS + any(plan.casts for plan in plans) + options.verify * memory.VERIFY_BUFFERS
    memory_of = partial(memory.plan_memory, options.allowed_memory, memory.held(), options.num_workers, num_buffers)
    if options.verify:  # `verify` opens the source again, and keeps a second record of each file.
        held += memory.VERIFY_NBYTES
    num_written = sum(plan.target.num_files for plan in plans)
    num_files = num_written + options.verify * (num_written + sum(plan.source.num_files for plan in plans))
    whole, bare = memory_of(num_files=num_files, held=held), memory_of(num_files=0)
    if options.destination is not None or whole.projected <= whole.allowed or bare.projected > bare.allowed:
        return whole, []
    return bare, [f"a run of this plan needs --max-memory {memory.human(whole.projected)} for the records of "
                  f"{num_written} files"]


def disk_problems(plans: Sequence[Plan], nbytes: int, destination: Path) -> Iterator[StreamReshardError]:
    """Problems of a destination of `nbytes`, on a disk that has too little room."""
    free, num_free = disk_free(destination)
    needed, weights = nbytes, plans[0]
    if needed > free and can_clone_all(weights.source.root, weights.source.paths, existing_parent(destination)):
        needed -= cloneable_nbytes(weights.source, weights.target)
    if needed > free:
        yield ResourceError(f"the destination needs {memory.human(needed)}, its disk has {memory.human(free)} free; "
                            f"free some space, or choose another disk")
    num_files = sum(plan.target.num_files for plan in plans)
    if num_free is not None and num_files > num_free:
        yield ResourceError(f"the destination needs {num_files} files, its disk has room for {num_free}; remove files, "
                            f"or choose another disk")


def num_jobs_of(options: Options, plans: Sequence[Plan]) -> int:
    """Number of jobs that can run at once within the limit on open files. Raises ResourceError if that is less than the
    number of workers."""
    per_job = 1 + max(_most_joined(plan) * plan.target.most_files for plan in plans)  # One more for a synced folder.
    per_worker = MAX_UNUSED + max(plan.source.most_files for plan in plans)
    room = free_descriptors() - _NUM_OPEN - options.num_workers * per_worker
    if room < options.num_workers * per_job:
        needed = _NUM_OPEN + options.num_workers * (per_job + per_worker)
        raise ResourceError(f"the run would open up to {needed} files at once with {options.num_workers} workers, the "
                            f"system allows {free_descriptors()} more; raise the limit (ulimit -n), or lower --workers")
    return min(room // per_job, options.num_workers + NUM_WAITING)


def _most_joined(plan: Plan) -> int:
    """The largest number of groups in a job."""
    return max(last - first for first, last in pairwise([*plan.starts, len(plan.order)]))
