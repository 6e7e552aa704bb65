"""A conversion: from options to a plan that is proved and fits, and from there to a checkpoint."""
from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

from stream_reshard import memory
from stream_reshard.casts import import_torch
from stream_reshard.destination import disk_free, existing_parent, occupation_problems
from stream_reshard.errors import Problems, ResourceError, StreamReshardError, UsageError, quoted
from stream_reshard.execute import Done, How, Output, run
from stream_reshard.formats.base import Source, Target
from stream_reshard.formats.ends import open_ends
from stream_reshard.journal import JOURNAL_NAME
from stream_reshard.lanes import NUM_BUFFERS
from stream_reshard.layouts.base import TORCH_DTYPES
from stream_reshard.machine import NETWORK_FILE_SYSTEMS, file_system_of
from stream_reshard.options import Options
from stream_reshard.plan import Job, Plan, make_plan
from stream_reshard.sharing import can_share_all, shareable_nbytes
from stream_reshard.small_files import files_below
from stream_reshard.source_digests import expected_sums, sum_problems
from stream_reshard.stop import Stop
from stream_reshard.target_file import Transport
from stream_reshard.tensor_file import Identity, identity_of

COMPANIONS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
              "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json")
"""Files that are copied from the source where it has them."""

NUM_WAITING = 8
"""Jobs that wait for the disk while others move bytes."""

MAPPED: frozenset[str] = frozenset()
"""File systems on which a mapping is faster than reading."""

_SAFETENSORS_DTYPES = {torch: name for name, torch in TORCH_DTYPES.items()}

_SMALL_FILES_NBYTES = 2**20
"""What the documents, the manifest and folders may take beside the weights."""


@dataclass(frozen=True)
class Conversion:
    """A plan, with everything that running it needs."""

    options: Options
    source: Source
    target: Target
    plan: Plan
    memory: memory.MemoryPlan
    notes: tuple[str, ...]
    """What the user should know and the target will not honour."""
    copies: dict[str, Path] = field(default_factory=dict)
    """Files to copy, by name."""
    identities: dict[str, Identity] = field(default_factory=dict)
    """The source files as the plan saw them."""
    copied: dict[str, Identity] = field(default_factory=dict)
    """The files to copy as the plan saw them, by absolute path."""

    @property
    def disk_nbytes(self) -> int:
        """Bytes the destination needs."""
        copied = sum(path.stat().st_size for path in self.copies.values())
        return self.plan.nbytes + copied + _SMALL_FILES_NBYTES

    @property
    def disk_free(self) -> int | None:
        """Bytes that the destination's disk has free; None where no destination is given."""
        return disk_free(self.options.destination.resolve())[0] if self.options.destination else None

    @property
    def transport(self) -> Transport:
        """By which way bytes move."""
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
        return TORCH_DTYPES[max(self.plan.dtypes.items(), key=lambda item: item[1])[0]]

    @cached_property
    def output(self) -> Output:
        """What will stand in the destination, which must be given."""
        options = self.options
        assert options.destination is not None, "an output needs a destination"
        destination = options.destination.resolve()
        texts = self.target.documents(self.source, self.plan.target, self.dtype, destination, self.copies)
        accepted = {*options.allow, *self.target.accepted(self.plan.target)}
        dtype = self.dtype if options.template and self.plan.casts else options.dtype
        facts = {"vocab_size": self.source.config.vocab_size, "dtype": dtype, "allowed": sorted(accepted),
                 "ignored_tensors": dict(self.source.ignored or {})}
        return Output(self.plan, destination, texts, self.target.marker, self.copies, self.identities, facts,
                      self.copied)

    @property
    def is_done(self) -> bool:
        """Whether the destination holds this very output already."""
        return self.options.destination is not None and self.output.is_done()


def plan_conversion(options: Options, stop: Stop | None = None) -> Conversion:
    """Read the source's headers and make the plan. Raises Refused with every problem found; writes nothing."""
    problems = Problems()
    identities = _identities(options.source) if os.path.isdir(options.source) else {}
    source, target = open_ends(options, problems)
    assert source.layout and source.model, "without them there are problems"
    if options.source_sha256 is not None:
        sums = expected_sums(options.source, identities, options.source_sha256)
        problems.extend(sum_problems(options.source, list(source.layout.paths), sums, stop or Stop()))
    dtypes = source.layout.dtype_at if options.dtype == "keep" else partial(_always, _SAFETENSORS_DTYPES[options.dtype])
    wanted = target.layout(options.destination or Path(), source.model, dtypes)
    plan = make_plan(source.layout, wanted)
    casts = bool(plan.casts)
    if casts:
        problems.collect(import_torch, "casting weights", ", or --dtype keep")
    budget, budget_notes = _budget(options, plan, casts, target.held_nbytes(plan.target))
    copies = _companions(options, problems)
    copied = {str(path.absolute()): identity_of(path.stat()) for path in copies.values()}
    notes = (*_notes(options, source, target), *target.notes(source, plan.target), *budget_notes)
    conversion = Conversion(options, source, target, plan, budget, notes,
                            copies, {name: identities[name] for name in source.files if name in identities}, copied)
    if options.destination is not None and (options.overwrite or not conversion.is_done):
        problems.extend(occupation_problems(options.destination, options.overwrite))
        problems.extend(_disk_problems(conversion, options.destination.resolve()))
    problems.extend(_memory_problems(budget))
    problems.raise_if_any()
    return conversion


def _identities(root: Path) -> dict[str, Identity]:
    """What the files of a folder, and those below `model`, are before any of them is read."""
    paths = [path.name for path in root.iterdir() if path.is_file()]
    paths += [f"model/{path}" for path in files_below(root / "model")]
    return {path: identity_of((root / path).stat()) for path in sorted(paths) if (root / path).is_file()}


def run_conversion(conversion: Conversion, progress: Callable[[Job], None] = lambda job: None,
                   stop: Stop | None = None) -> Done:
    """Write the checkpoint.

    `progress` is called with every finished job. A request to `stop` ends the run with Interrupted; it can be resumed.
    """
    options, stop = conversion.options, stop or Stop()
    executor = ThreadPoolExecutor(options.workers + NUM_WAITING)
    how = How(conversion.memory.block_nbytes, executor, options.restart, options.overwrite, options.break_lock,
              conversion.transport, options.workers, partial(_check, conversion, stop) if options.verify else None,
              progress, stop)
    try:
        return run(conversion.output, how)
    finally:
        executor.shutdown(cancel_futures=True)


def _check(conversion: Conversion, stop: Stop, folder: Path) -> None:
    """Compare a finished folder with the source. Raises DifferenceError or Refused."""
    from stream_reshard.verify import How as HowToVerify
    from stream_reshard.verify import verify
    options = conversion.options
    how = HowToVerify(options.max_memory, vocab_size=options.vocab_size, ignored=(JOURNAL_NAME,),
                      name=conversion.output.destination, plan=conversion.memory)
    verify(options.source, folder, how, stop)


def _always(dtype: str, number: int) -> str:
    return dtype


def _budget(options: Options, plan: Plan, casts: bool, held: int) -> tuple[memory.MemoryPlan, list[str]]:
    """What the run will need of memory, and what to say of it. A run keeps a record per file, and `held` bytes of
    documents; where no destination is given nothing is run, and a limit that is too small for the records alone is no
    reason to refuse."""
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


def _memory_problems(budget: memory.MemoryPlan) -> Iterator[StreamReshardError]:
    if budget.projected > budget.allowed:
        yield ResourceError(f"--max-memory {memory.human(budget.allowed)} cannot be kept: the run would reach "
                            f"{memory.human(budget.projected)} with {budget.num_workers} workers"
                            f"{' and torch for casts' if budget.casts else ''}; raise it, or lower --workers")


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


def _companions(options: Options, problems: Problems) -> dict[str, Path]:
    """Files to copy, by name: the source's own, or where a folder is given, the tokenizer's from there."""
    found = {name: options.source / name for name in COMPANIONS if (options.source / name).is_file()}
    if options.tokenizer is None:
        return found
    given = {name: options.tokenizer / name for name in COMPANIONS if (options.tokenizer / name).is_file()}
    if not given:
        problems.append(UsageError(f"--tokenizer {quoted(options.tokenizer)} holds none of {', '.join(COMPANIONS)}"))
    return found | given


def _notes(options: Options, source: Source, target: Target) -> Iterator[str]:
    if options.destination is not None and options.destination.is_symlink():
        yield f"{quoted(options.destination)} is a link; {quoted(options.destination.resolve())} is written"
    yield from (f"accepted: {limit.text}" for limit in target.limits(source))
    yield from source.notes
