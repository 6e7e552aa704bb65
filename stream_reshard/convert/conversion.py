"""A conversion: from options to a plan that is proved and fits, and from there to a checkpoint."""
from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from stream_reshard.check.source_digests import expected_sums, sum_problems
from stream_reshard.convert.ends import open_ends
from stream_reshard.convert.notes import main_dtype, notes_of
from stream_reshard.destination.access import access_notes
from stream_reshard.destination.companions import Companion, find_companions
from stream_reshard.destination.journal import JOURNAL_NAME
from stream_reshard.destination.refusals import disk_free, existing_parent, occupation_problems
from stream_reshard.errors import DestinationError, Problems, ResourceError, StreamReshardError, UsageError, quoted
from stream_reshard.formats.base import Source, Target
from stream_reshard.formats.nanotron.documents import yaml_string
from stream_reshard.formats.nanotron.names import NAMING
from stream_reshard.machine import memory
from stream_reshard.machine.kernel import NETWORK_FILE_SYSTEMS, file_system_of, free_descriptors
from stream_reshard.machine.stop import Stop
from stream_reshard.options import Options
from stream_reshard.plan.alignment import shareable_nbytes
from stream_reshard.plan.plan import Job, Plan, make_plan
from stream_reshard.run.lanes import MAX_UNUSED, NUM_BUFFERS
from stream_reshard.run.output import Done, How, Output, run
from stream_reshard.storage.cloning import can_share_all
from stream_reshard.storage.dtypes import SAFETENSORS_DTYPES, import_torch
from stream_reshard.storage.identity import Identity
from stream_reshard.storage.small_files import real_path
from stream_reshard.storage.target_file import Transport

NUM_WAITING = 8
"""Jobs that wait for the disk while others move bytes."""

_NUM_OPEN = 8
"""Files open beside those of jobs: lock, journal, folders that are listed, modules being imported."""

MAPPED: frozenset[str] = frozenset()
"""File systems on which a mapping is faster than reading."""

_SMALL_FILES_NBYTES = 2**20
"""Bytes that the documents, the manifest and folders may take beside the weights."""


@dataclass(frozen=True)
class Conversion:
    """A plan, with everything that running it needs."""

    options: Options
    source: Source
    target: Target
    plan: Plan
    memory: memory.MemoryPlan
    notes: tuple[str, ...]
    """Remarks for the user, and settings that the target will not honour."""
    num_threads: int
    """Jobs under way at once: some of them move bytes, others wait for the disk."""
    copies: dict[str, Companion] = field(default_factory=dict)
    """Files to copy, by name."""

    @property
    def identities(self) -> Mapping[str, Identity]:
        """The source files as they were before they were read, by path."""
        return self.source.identities

    @property
    def disk_nbytes(self) -> int:
        """Bytes the destination needs."""
        return self.plan.nbytes + sum(own.nbytes for own in self.copies.values()) + _SMALL_FILES_NBYTES

    @property
    def disk_free(self) -> int | None:
        """Bytes that the destination's disk has free; None where no destination is given."""
        return disk_free(real_path(self.options.destination))[0] if self.options.destination else None

    @property
    def transport(self) -> Transport:
        """Way in which bytes move."""
        is_mapped = self.options.io == "mmap" or (self.options.io == "auto" and self.file_system in MAPPED)
        return Transport(is_mapped, copies_on_server=self.file_system in NETWORK_FILE_SYSTEMS,
                         digests=self.options.digests)

    @cached_property
    def file_system(self) -> str:
        """The type of the file system that the source is on."""
        return file_system_of(self.plan.source.root)

    @property
    def dtype(self) -> str:
        """The dtype most weights have in the target, under torch's name."""
        return main_dtype(self.plan)

    @cached_property
    def output(self) -> Output:
        """Output for the destination, which must be given."""
        options = self.options
        assert options.destination is not None, "an output needs a destination"
        destination = real_path(options.destination)
        texts = self.target.documents(self.source, self.plan.target, self.dtype, destination, self.copies)
        accepted = {*options.allow, *self.target.accepted(self.plan.target)}
        dtype = self.dtype if options.template and self.plan.casts else options.dtype
        config = self.source.config
        facts = {"vocab_size": config.vocab_size, "dtype": dtype, "allowed": sorted(accepted),
                 "ignored_tensors": dict(self.source.ignored or {}), "token_ids": config.token_ids,
                 "router_dtype": self.source.router_dtype if dtype == "keep" else None}
        return Output(self.plan, destination, texts, self.target.marker, _digest(texts, destination), NAMING,
                      self.copies, self.identities, facts)

    @property
    def is_done(self) -> bool:
        """The destination holds this very output already."""
        return self.options.destination is not None and self.output.is_done()


def plan_conversion(options: Options, stop: Stop | None = None) -> Conversion:
    """Read the source's headers and make the plan. Raises Refused with every problem found; writes nothing."""
    options, problems = _settled(options), Problems()
    source, target = open_ends(options, problems)
    assert source.layout and source.model, "without them there are problems"
    found = find_companions(options.source, options.tokenizer, problems)
    if options.source_sha256 is not None:
        names = {*source.identities, *(name for name, own in found.files.items() if own.path.parent == options.source)}
        sums = expected_sums(options.source, names, options.source_sha256)
        problems.extend(sum_problems(options.source, list(source.layout.paths), sums, stop or Stop()))
    dtypes = source.layout.dtype_at if options.dtype == "keep" else partial(_always, SAFETENSORS_DTYPES[options.dtype])
    wanted = target.layout(options.destination or Path(), source.model, dtypes)
    plan = make_plan(source.layout, wanted)
    casts = bool(plan.casts)
    if casts:
        problems.collect(import_torch, "casting weights", ", or --dtype keep")
    budget, budget_notes = _budget(options, plan, casts, target.held_nbytes(plan.target))
    notes = (*notes_of(options, source, target, plan, found.files), *found.notes, *budget_notes,
             *access_notes((source.layout.root / path for path in source.layout.paths),
                           options.destination if options.overwrite else None))
    num_threads = problems.collect(_num_threads, options, plan) if options.destination is not None else 0
    conversion = Conversion(options, source, target, plan, budget, notes, num_threads, found.files)
    if options.destination is not None:
        _check_destination(conversion, problems)
    problems.extend(budget.problems("the run"))
    problems.raise_if_any()
    return conversion


def _num_threads(options: Options, plan: Plan) -> int:
    """Jobs that may be under way at once with the files that can be open. Raises ResourceError where those are too few
    for the workers alone."""
    largest = max(last - first for first, last in pairwise([*plan.starts, len(plan.order)]))
    per_job = largest * plan.target.most_files + 1  # And a folder that is synced.
    per_worker = plan.source.most_files + MAX_UNUSED
    room = free_descriptors() - _NUM_OPEN - options.workers * per_worker
    if room < options.workers * per_job:
        needed = _NUM_OPEN + options.workers * (per_job + per_worker)
        raise ResourceError(f"the run would have up to {needed} files open at once with {options.workers} workers, and "
                            f"{free_descriptors()} more can be; raise the limit (ulimit -n), or lower --workers")
    return min(room // per_job, options.workers + NUM_WAITING)


def _settled(options: Options) -> Options:
    """The same options, with paths that name one place whatever becomes of the working folder and of links on the way
    to a source. Raises UsageError where a relative path begins in a folder that is gone."""
    paths = {name: path for name in ("source", "destination", "tokenizer", "template")
             if (path := getattr(options, name)) is not None}
    settled: dict[str, Any] = {}
    for name, path in paths.items():
        try:
            whole = path.absolute()
        except FileNotFoundError as error:
            raise UsageError(f"{quoted(path)} begins in the working folder, which is gone; give the whole path"
                             ) from error
        if name == "destination":
            settled[name] = whole
        elif os.path.isdir(path):
            settled[name] = real_path(path)
    return replace(options, **settled)


def _check_destination(conversion: Conversion, problems: Problems) -> None:
    """Collects in `problems` what stands in the destination and what its disk has no room for."""
    options, output = conversion.options, conversion.output
    manifest = None if options.overwrite else output.finished()
    if manifest is not None and (names := output.moved(manifest)):
        problems.append(DestinationError(
            f"{quoted(output.destination)} holds this conversion, complete, but was made at another place, which "
            f"{', '.join(names)} names; change it there, or --overwrite makes the folder anew"))
    elif manifest is None:
        problems.extend(occupation_problems(output.destination, options.overwrite, NAMING))
        problems.extend(_disk_problems(conversion, output.destination))


def _digest(documents: Mapping[str, bytes], destination: Path) -> str:
    """A digest of documents that is the same wherever the destination is."""
    begin = yaml_string(str(destination))[:-1].encode()
    texts = sorted((name, text.replace(begin, b'"')) for name, text in documents.items())
    return hashlib.sha256(repr(texts).encode()).hexdigest()


def run_conversion(conversion: Conversion, progress: Callable[[Job], None] = lambda job: None,
                   stop: Stop | None = None) -> Done:
    """Write the checkpoint.

    `progress` is called with every finished job. A request to `stop` ends the run with Interrupted; it can be resumed.
    """
    options, stop = conversion.options, stop or Stop()
    check = partial(_check, conversion, stop) if options.verify else None
    how = How(conversion.memory.block_nbytes, None, options.restart, options.overwrite, options.break_lock,
              conversion.transport, options.workers, conversion.num_threads, check, progress, stop)
    return run(conversion.output, how)


def _check(conversion: Conversion, stop: Stop, folder: Path) -> None:
    """Compare a finished folder with the source. Raises DifferenceError or Refused."""
    from stream_reshard.check.weights import How as HowToVerify
    from stream_reshard.check.weights import verify
    options = conversion.options
    how = HowToVerify(options.max_memory, vocab_size=options.vocab_size, ignored=(JOURNAL_NAME,),
                      name=conversion.output.destination, plan=conversion.memory)
    verify(options.source, folder, how, stop)


def _always(dtype: str, number: int) -> str:
    return dtype


def _budget(options: Options, plan: Plan, casts: bool, held: int) -> tuple[memory.MemoryPlan, list[str]]:
    """Memory of the run, and remarks on it. A run keeps a record per file, and `held` bytes of documents. Without a
    destination only the plan must fit in memory, not the run's per-file records."""
    of = partial(memory.plan_memory, options.allowed_memory, memory.resident(), options.workers, casts,
                 NUM_BUFFERS + options.verify * memory.VERIFY_BUFFERS)
    if options.verify:  # It keeps a record of each file once more, and opens the source again.
        held += memory.VERIFY_NBYTES
    num_files = plan.target.num_files + options.verify * (plan.target.num_files + plan.source.num_files)
    whole, bare = of(num_files=num_files, held=held), of(num_files=0)
    if options.destination is not None or whole.projected <= whole.allowed or bare.projected > bare.allowed:
        return whole, []
    return bare, [f"a run of this plan needs --max-memory {memory.human(whole.projected)} for the records of "
                  f"{plan.target.num_files} files"]


def _disk_problems(conversion: Conversion, destination: Path) -> Iterator[StreamReshardError]:
    free, num_free = disk_free(destination)
    needed, plan = conversion.disk_nbytes, conversion.plan
    if needed > free and can_share_all(plan.source.root, plan.source.paths, existing_parent(destination)):
        needed -= shareable_nbytes(plan.source, plan.target)
    if needed > free:
        yield ResourceError(f"the destination needs {memory.human(needed)}, its disk has "
                            f"{memory.human(free)} free")
    num_files = conversion.plan.target.num_files
    if num_free is not None and num_files > num_free:
        yield ResourceError(f"the destination needs {num_files} files, its disk has room for {num_free}")
