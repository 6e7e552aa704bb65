"""Conversion: a plan made from options, proved and within memory and disk, and its run."""
from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stream_reshard.check.source_digests import expected_sums, sum_problems
from stream_reshard.convert.ends import open_ends
from stream_reshard.convert.notes import main_dtype, notes_of
from stream_reshard.convert.room import budget_of, disk_problems, num_jobs_of
from stream_reshard.destination.access import access_notes
from stream_reshard.destination.companions import Companion, copied_from, find_companions, without_card
from stream_reshard.destination.journal import JOURNAL_NAME
from stream_reshard.destination.lock import lock_problems
from stream_reshard.destination.refusals import disk_free, num_kept_in, occupation_problems
from stream_reshard.destination.staging import lock_of
from stream_reshard.errors import DestinationError, Problems, UsageError, quoted
from stream_reshard.formats.base import Source, Target
from stream_reshard.formats.nanotron.names import NAMING
from stream_reshard.machine import memory
from stream_reshard.machine.kernel import NETWORK_FILE_SYSTEMS, file_system_of
from stream_reshard.machine.stop import Stop
from stream_reshard.model.truncation import WHOLE
from stream_reshard.options import Options, VerifyOptions
from stream_reshard.plan.plan import Job, Plan, make_plan
from stream_reshard.report import Progress, Reported
from stream_reshard.run.output import Output
from stream_reshard.run.states import States
from stream_reshard.run.writing import Done, RunOptions, run
from stream_reshard.storage.dtypes import SAFETENSORS_DTYPES
from stream_reshard.storage.identity import Identity
from stream_reshard.storage.small_files import real_path
from stream_reshard.storage.target_file import Transport

if TYPE_CHECKING:
    from stream_reshard.formats.nanotron.training.target import NewTrainingState
    from stream_reshard.convert.estimate import Estimate

_ANYWHERE = Path("/anywhere")
"""A destination, for a digest of documents that does not depend on the true one."""

_SMALL_FILES_NBYTES = 2**20
"""Bytes on disk for documents, manifest and folders beside the weights."""


@dataclass(frozen=True, repr=False)
class Conversion(Reported):
    """A plan, with everything that its run needs."""

    options: Options
    source: Source
    target: Target[Any]
    plan: Plan
    memory: memory.MemoryPlan
    notes: tuple[str, ...]
    """Remarks for the user, accepted settings included."""
    states: States | None = None
    """The training state that goes along; None for weights alone."""
    num_threads: int = 0
    """Jobs under way at once: some of them move bytes, others wait for the disk."""
    num_kept: int = 0
    """Files in the staging folder that the run can keep, from an earlier attempt."""
    companions: dict[str, Companion] = field(default_factory=dict)
    """Companions to copy, by name."""
    estimate: Estimate | None = None
    """The time of the run, where it was asked for and its disks could be tried."""

    @property
    def facts(self) -> dict[str, Any]:
        """The plan as JSON; sizes in bytes."""
        from stream_reshard.convert.report import as_json
        return as_json(self)

    @property
    def lines(self) -> tuple[str, ...]:
        """The plan for a person: source, target, parts, memory, disk, notes."""
        from stream_reshard.convert.report import plan_lines
        return tuple(plan_lines(self))

    @property
    def identities(self) -> Mapping[str, Identity]:
        """Identities of the source files, by path, from before they were read."""
        return {**self.source.identities, **self.target.identities()}

    @property
    def plans(self) -> tuple[Plan, ...]:
        """The plans of weights and of states."""
        return (self.plan, self.states.plan) if self.states else (self.plan,)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensor files."""
        return sum(plan.nbytes for plan in self.plans)

    @property
    def num_files(self) -> int:
        """Number of tensor files."""
        return sum(plan.target.num_files for plan in self.plans)

    @property
    def disk_nbytes(self) -> int:
        """Bytes that the destination takes on disk."""
        return self.nbytes + sum(own.nbytes for own in self.companions.values()) + _SMALL_FILES_NBYTES

    @property
    def disk_free(self) -> int | None:
        """Free bytes on the disk of the destination; None without a destination."""
        return disk_free(real_path(self.options.destination))[0] if self.options.destination else None

    @property
    def transport(self) -> Transport:
        """The way in which bytes move."""
        is_remote = file_system_of(self.plan.source.root) in NETWORK_FILE_SYSTEMS
        return Transport(self.options.io == "mmap", copies_on_server=is_remote, digests=self.options.digests)

    @property
    def dtype(self) -> str:
        """The dtype of most bytes of the target's weights, under torch's name."""
        return main_dtype(self.plan)

    @cached_property
    def output(self) -> Output:
        """The output at the destination. Raises UsageError for a plan without one."""
        options = self.options
        if options.destination is None:
            raise UsageError("the plan has no destination, so it cannot be run; give one to api.plan")
        destination = real_path(options.destination)
        documents = partial(self.target.documents, self.source, self.plan.target, self.dtype,
                            companions=self.companions)
        digest = hashlib.sha256(repr(sorted(documents(destination=_ANYWHERE).items())).encode()).hexdigest()
        accepted = {*options.allow, *self.target.accepted_differences(self.plan.target)}
        dtype = self.dtype if options.template and self.plan.casts else options.dtype
        config = self.source.config
        vocab_size = self.source.recorded_vocab_size if self.states else config.vocab_size
        whole = config.whole_num_hidden_layers
        facts = {"vocab_size": vocab_size, "dtype": dtype, "allowed": sorted(accepted),
                 "ignored_tensors": dict(self.source.ignored or {}), "token_ids": config.token_ids,
                 "router_dtype": self.source.router_dtype if dtype == "keep" else None,
                 **({WHOLE: whole} if whole else {}), **({"from_masters": True} if options.from_masters else {}),
                 **({"origin": dict(self.source.origin)} if self.source.origin else {})}
        return Output(self.plan, destination, documents(destination=destination), self.target.marker, digest, NAMING,
                      self.companions, self.identities, facts, self.states)

    @property
    def is_done(self) -> bool:
        """True if the destination already holds this output, complete."""
        return self.options.destination is not None and self.output.is_done()


def plan_conversion(options: Options, stop: Stop | None = None) -> Conversion:
    """Read the headers of the source and make the plan; nothing is written. Raises Refused with every problem found."""
    options, problems = _with_fixed_paths(options), Problems()
    source, target = open_ends(options, problems)
    found = find_companions(options.source, options.tokenizer, problems)
    if source.config.whole_num_hidden_layers is not None:
        found = without_card(found)
    if options.source_sha256 is not None:
        names = {*source.identities, *(name for name, own in found.files.items() if own.path.parent == options.source)}
        sums = expected_sums(options.source, names, options.source_sha256)
        problems.extend(sum_problems(options.source, list(source.layout.paths), sums, stop or Stop()))
    dtypes = source.layout.dtype_at if options.dtype == "keep" else partial(_always, SAFETENSORS_DTYPES[options.dtype])
    wanted = target.layout(options.destination or Path(), source.layout.model, dtypes)
    plan = make_plan(source.layout, wanted)
    states = _states(target.state(wanted))
    found.files.update({name: copied_from(path) for name, path in target.copied().items()})
    plans = (plan, states.plan) if states else (plan,)
    budget, budget_notes = budget_of(options, plans, target.held_nbytes(plan.target))
    notes = (*notes_of(options, source, target, plan, found.files), *found.notes, *budget_notes,
             *access_notes((source.layout.root / path for path in source.layout.paths),
                           options.destination if options.overwrite else None))
    conversion = Conversion(options, source, target, plan, budget, notes, states, companions=found.files)
    if options.destination is not None:
        num_threads = problems.collect(num_jobs_of, options, plans) or 0
        _check_destination(conversion, problems)
        num_kept = problems.collect(_num_kept, conversion) or 0
        conversion = replace(conversion, num_threads=num_threads, num_kept=num_kept)
    problems.extend(budget.problems("the run"))
    problems.raise_if_any()
    return conversion


def _states(new: NewTrainingState | None) -> States | None:
    """The plan of a training state."""
    if new is None:
        return None
    from stream_reshard.plan.states import make_state_plan
    return States(make_state_plan(new.source.layout, new.layout, new.digest), new)


def _with_fixed_paths(options: Options) -> Options:
    """The options with an absolute destination, and the folders to read by their real paths: changes of the working
    folder, or of links, do not affect the run. Raises UsageError for a relative path in a removed working folder."""
    fixed: dict[str, Any] = {}
    for name in ("source", "destination", "tokenizer", "template"):
        path: Path | None = getattr(options, name)
        if path is None:
            continue
        try:
            absolute = path.absolute()
        except FileNotFoundError as error:
            raise UsageError(f"{quoted(path)} is relative, and the working folder is gone; give an absolute path"
                             ) from error
        if name == "destination":
            fixed[name] = absolute
        elif os.path.isdir(path):
            fixed[name] = real_path(path)
    return replace(options, **fixed)


def _check_destination(conversion: Conversion, problems: Problems) -> None:
    """Add to `problems` the reasons why the destination cannot be written: its contents, or a full disk."""
    options, output = conversion.options, conversion.output
    problems.extend(lock_problems(lock_of(output.destination)))
    manifest = None if options.overwrite else output.finished()
    if manifest is not None and (names := output.moved(manifest)):
        problems.append(DestinationError(
            f"{quoted(output.destination)} holds this conversion, complete, but was made at another place, which "
            f"{', '.join(names)} names; change the path there, or add --overwrite to make the folder again"))
    elif manifest is None:
        problems.extend(occupation_problems(output.destination, options.overwrite, NAMING))
        problems.extend(disk_problems(conversion.plans, conversion.disk_nbytes, output.destination))


def _num_kept(conversion: Conversion) -> int:
    """Files that an earlier attempt has left for this run. Raises DestinationError where another run has left some."""
    return 0 if conversion.options.restart else num_kept_in(conversion.output.destination, conversion.output.record)


def run_conversion(conversion: Conversion, progress: Callable[[Job], None] = lambda job: None,
                   stop: Stop | None = None, check_progress: Progress = lambda done, total: None) -> Done:
    """Write the checkpoint.

    `progress` is called with every finished job, `check_progress` with parts of a comparison. A request to
    `stop` ends the run with Interrupted; it can be resumed.
    """
    options, output, stop = conversion.options, conversion.output, stop or Stop()
    check = partial(_check, conversion, stop, check_progress) if options.verify else None
    run_options = RunOptions(conversion.memory.block_nbytes, None, options.restart, options.overwrite,
                             options.break_lock, conversion.transport, options.num_workers, conversion.num_threads,
                             check, progress, stop)
    return run(output, run_options)


def _check(conversion: Conversion, stop: Stop, progress: Progress, folder: Path) -> None:
    """Compare a finished folder with the source. Raises DifferenceError or Refused."""
    from stream_reshard.check.weights import verify
    options = conversion.options
    scope = VerifyOptions(max_memory=options.max_memory, vocab_size=options.vocab_size, ignored=(JOURNAL_NAME,),
                          name=conversion.output.destination, plan=conversion.memory)
    verify(options.source, folder, scope, stop, progress)


def _always(dtype: str, number: int) -> str:
    return dtype
