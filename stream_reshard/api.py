"""Interface for notebooks, and all that the command line uses: plan, run, verify, inspect, diff::

    from stream_reshard import api
    conversion = api.plan("llama-7b", "llama-7b-tp4", tp=4, pp=2, max_memory="256MiB")
    print(api.described(conversion))                           # what it will do and need
    result = api.run(conversion, progress=lambda done, total: print(f"{done / total:.0%}"))
    api.verify("llama-7b", "llama-7b-tp4")                     # raises where any weight differs
    print(result.facts["peak_nbytes"])

Where a folder of Nanotron's steps is given, latest.txt in it is followed, as Nanotron does.

Every function raises what `errors` draws: a StreamReshardError, whose text is meant for people, or Refused, which holds
all problems found at once. Sizes are in bytes, or words such as "512MiB" and "5GB".
"""
from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stream_reshard.convert import report
from stream_reshard.convert.conversion import Conversion, plan_conversion, run_conversion
from stream_reshard.errors import DifferenceError
from stream_reshard.formats.nanotron.folder import litter_notes
from stream_reshard.formats.registry import followed
from stream_reshard.machine import memory
from stream_reshard.machine.kernel import io_counters
from stream_reshard.machine.stop import Stop
from stream_reshard.model.topology import Topology
from stream_reshard.options import Options
from stream_reshard.plan.plan import Job
from stream_reshard.run.output import Done

if TYPE_CHECKING:
    from stream_reshard.check.forward import ForwardPlan
    from stream_reshard.check.forward.result import Comparison

__all__ = ["Conversion", "ForwardResult", "Result", "Stop", "described", "described_forward", "diff", "facts_of",
           "inspect", "plan", "plan_forward", "run", "run_forward", "verify"]

_SWITCH_SECONDS = 0.0005
"""Longest time that a thread keeps others from running Python while bytes are moved."""

Folder = str | PathLike[str]
Size = int | str


@memory.granted()
def plan(source: Folder, destination: Folder | None = None, *, tp: int = 1, pp: int = 1, dp: int = 1,
         max_memory: Size = memory.DEFAULT_ALLOWED, max_shard_size: Size = Options.max_shard_nbytes,
         tokenizer: Folder | None = None, template: Folder | None = None, allow: Collection[str] = (),
         stop: Stop | None = None, **choices: Any) -> Conversion:
    """Plan of a conversion; reads headers and configs only, and writes nothing.

    `tp`, `pp`, `dp`: ranks along each parallel axis of Nanotron. `max_memory`: limit on the peak resident set of the
    whole process tree, this process included. `max_shard_size`: bytes of tensors in a Hugging Face shard. `template`: a
    Nanotron checkpoint to be filled. `choices`: fields of `options.Options` by name, such as to="hf", dtype="bfloat16",
    rope="interleaved", vocab_size=32000, num_workers=2, overwrite=True.

    For people `described` tells it, `facts_of` as JSON. Raises Refused.
    """
    root, notes = followed(Path(source))
    like, more = (None, []) if template is None else followed(Path(template))
    more += litter_notes(like) if like else ()
    options = Options(root, None if destination is None else Path(destination), Topology(tp, pp, dp),
                      max_memory=_nbytes(max_memory), max_shard_nbytes=_nbytes(max_shard_size),
                      tokenizer=None if tokenizer is None else Path(tokenizer), template=like, allow=tuple(allow),
                      **choices)
    conversion = plan_conversion(options, stop)
    return replace(conversion, notes=(*notes, *more, *conversion.notes))


def described(conversion: Conversion) -> str:
    """A plan as text: source, target, what goes where, memory and disk, what will not be honoured."""
    return "\n".join(report.plan_lines(conversion))


def facts_of(conversion: Conversion) -> dict[str, Any]:
    """A plan as JSON; sizes in bytes."""
    return report.as_json(conversion)


def _nbytes(size: Size) -> int:
    return memory.parse_nbytes(size) if isinstance(size, str) else size


@dataclass(frozen=True)
class Result:
    """A conversion that ended well; the destination is durable."""

    conversion: Conversion
    seconds: float
    peak_nbytes: int
    """Highest resident set of this process."""
    io: Mapping[str, int]
    """Bytes that the kernel counted during the run (proc_pid_io(5)): rchar, wchar, read_bytes, write_bytes."""
    done: Done = field(repr=False)

    @property
    def already_done(self) -> bool:
        """True where the destination held this very output before, and was not to be made anew."""
        return self.done.was_finished and not self.conversion.options.overwrite

    @property
    def facts(self) -> dict[str, Any]:
        """The plan and its outcome, as JSON; sizes in bytes."""
        if self.already_done:
            return report.as_json(self.conversion) | {"already_done": True}
        return report.summary(self.conversion, self.seconds, self.peak_nbytes, self.io, self.done)

    @property
    def lines(self) -> Iterator[str]:
        """Summary of the run, for a person."""
        if self.already_done:
            return report.done_lines(self.conversion)
        return report.summary_lines(self.conversion, self.seconds, self.peak_nbytes, self.io, self.done)


@memory.granted()
def run(conversion: Conversion, progress: Callable[[int, int], None] | None = None,
        stop: Stop | None = None) -> Result:
    """Write the destination: whole, or not at all.

    `progress(done, total)` is called with bytes of target files as they become durable. Another thread ends the run
    with `stop.request()`: it raises Interrupted, and the same plan run again goes on where it was. Raises SourceError
    where the source changed, DestinationError, ResourceError (disk, I/O; resumable), LockedError, DifferenceError where
    `verify` was chosen and found one.
    """
    begin, io_before = time.monotonic(), io_counters()
    num_done = 0

    def advance(job: Job) -> None:
        nonlocal num_done
        num_done += job.nbytes
        if progress is not None:
            progress(num_done, conversion.plan.nbytes)

    with _switching_soon():
        done = run_conversion(conversion, advance, stop)
    return Result(conversion, time.monotonic() - begin, memory.peak_resident(), io_counters(io_before), done)


@contextmanager
def _switching_soon() -> Iterator[None]:
    """A thread that waits for the next block does not wait long: others let it run Python after `_SWITCH_SECONDS`."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_SECONDS)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


@memory.granted()
def verify(source: Folder, copy: Folder, *, max_memory: Size = memory.DEFAULT_ALLOWED, stop: Stop | None = None,
           progress: Callable[[int, int], None] = lambda done, total: None, **choices: Any) -> dict[str, Any]:
    """Compare every weight of two checkpoints, of whatever formats, through the headers of their files; returns counts.

    `progress(done, total)` counts parts of the work. `choices`: fields of `check.weights.VerifyOptions` by name, such
    as quick=True, sample=0.1, seed=1, num_workers=2. Raises Refused with every difference (a DifferenceError each:
    file, parameter, first index, both values).
    """
    from stream_reshard.check.weights import VerifyOptions
    from stream_reshard.check.weights import verify as compare
    (root, notes), (other, more) = followed(Path(source)), followed(Path(copy), is_copy=True)
    facts = compare(root, other, VerifyOptions(_nbytes(max_memory), **choices), stop, progress)
    return facts | {"notes": [*notes, *more, *litter_notes(root), *litter_notes(other), *facts["notes"]]}


@memory.granted()
def plan_forward(source: Folder, copy: Folder, *, max_memory: Size = memory.DEFAULT_ALLOWED,
                 text: Folder | None = None, plot: Folder | None = None, **choices: Any) -> ForwardPlan:
    """Plan of a run of two checkpoints over the same tokens, with its memory; reads headers and configs only.

    `text`: a file whose first tokens are taken, by the tokenizer.json in one of the folders; random ones without it.
    `plot`: a .png file to draw. `choices`: fields of `check.forward.ForwardOptions` by name, such as num_tokens=64,
    seed=1, tolerance=1e-3, dtype="bfloat16". For people `described_forward` tells it. Raises Refused.
    """
    from stream_reshard.check import forward
    how = forward.ForwardOptions(text=None if text is None else Path(text), plot=None if plot is None else Path(plot),
                      max_memory=_nbytes(max_memory), **choices)
    return forward.plan_forward(followed(Path(source))[0], followed(Path(copy), is_copy=True)[0], how)


def described_forward(plan: ForwardPlan) -> str:
    """A plan of a forward pass as text: what will be done, and what memory it needs."""
    from stream_reshard.check.forward import report
    return "\n".join(report.plan_lines(plan))


@dataclass(frozen=True)
class ForwardResult:
    """Two forward passes, compared."""

    plan: ForwardPlan
    comparison: Comparison
    seconds: float
    peak_nbytes: int
    """Highest resident set of this process."""

    @property
    def facts(self) -> dict[str, Any]:
        """Differences by layer and of the logits, as JSON."""
        from stream_reshard.check.forward import report
        return report.as_json(self.plan, self.comparison, self.seconds, self.peak_nbytes)

    @property
    def lines(self) -> Iterator[str]:
        """Differences by layer and of the logits, for a person."""
        from stream_reshard.check.forward import report
        return report.lines(self.plan, self.comparison, self.seconds, self.peak_nbytes)

    @property
    def difference(self) -> DifferenceError | None:
        """First step at which the two differ by more than is tolerated; None where they agree."""
        from stream_reshard.check.forward import report
        return report.finding(self.plan, self.comparison)


@memory.granted()
def run_forward(plan: ForwardPlan, progress: Callable[[int, int], None] = lambda done, total: None,
                stop: Stop | None = None) -> ForwardResult:
    """Run both checkpoints, layer by layer, in float32 on the CPU; needs torch.

    `progress(done, total)` counts layers. Raises DifferenceError where the two do not go through the same steps;
    numbers that differ are told by the result.
    """
    from stream_reshard.check import forward
    begin = time.monotonic()
    comparison = forward.run_forward(plan, progress, stop)
    return ForwardResult(plan, comparison, time.monotonic() - begin, memory.peak_resident())


@memory.granted()
def inspect(folder: Folder, values: bool = False, stop: Stop | None = None) -> dict[str, Any]:
    """Contents of a checkpoint folder of either format: family, sizes, dtypes, topology, stages, versions, faults; with
    `values` every weight is read, and NaN and infinities are counted. Raises SourceError."""
    from stream_reshard.check.inspect import inspect as look
    root, notes = followed(Path(folder))
    facts = look(root, values, stop)
    return facts | {"notes": [*notes, *facts["notes"]]}


@memory.granted()
def diff(one: Folder, other: Folder) -> dict[str, Any]:
    """Differences between the layouts of two checkpoints of one model, tensor by tensor: {"same", "differences",
    "num_more"}. No weight is read. Raises Refused."""
    from stream_reshard.check.diff import diff as compare
    (left, notes), (right, more) = followed(Path(one)), followed(Path(other))
    return compare(left, right) | {"notes": [*notes, *more, *litter_notes(left), *litter_notes(right)]}
