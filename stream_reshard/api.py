"""Interface for notebooks, and all that the command line uses: plan, run, verify, inspect, diff::

    from stream_reshard import api
    conversion = api.plan("llama-7b", "llama-7b-tp4", tp=4, pp=2, max_memory="256MiB")
    print(conversion)                                          # what it will do and need
    result = api.run(conversion, progress=lambda done, total: print(f"{done / total:.0%}"))
    api.verify("llama-7b", "llama-7b-tp4")                     # raises where any weight differs
    print(result.facts["peak_nbytes"])

Every result has `facts`, a dict that JSON takes, with sizes in bytes, and `lines`, the same for a person. Keywords are
the flags of the command line: max_memory="256MiB" is --max-memory 256MiB. Where a folder of Nanotron's steps is given,
latest.txt in it is followed, as Nanotron does.

Every function raises what `errors` draws: a StreamReshardError, whose text is meant for people, or Refused, which holds
all problems found at once.
"""
from __future__ import annotations

import inspect as inspection
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from stream_reshard.convert.conversion import Conversion, plan_conversion, run_conversion
from stream_reshard.convert.report import Result
from stream_reshard.errors import UsageError
from stream_reshard.formats.nanotron.folder import litter_notes
from stream_reshard.formats.registry import followed
from stream_reshard.machine import memory
from stream_reshard.machine.kernel import io_counters
from stream_reshard.machine.stop import Stop
from stream_reshard.options import ForwardOptions, Options, VerifyOptions
from stream_reshard.options.conversion import Digests, Format, Io, NanotronConfig, Rope, Version
from stream_reshard.options.declaring import did_you_mean
from stream_reshard.options.resources import Dtype
from stream_reshard.plan.plan import Job
from stream_reshard.report import Report

if TYPE_CHECKING:
    from stream_reshard.check.forward import ForwardPlan
    from stream_reshard.check.forward.report import ForwardResult

__all__ = ["Conversion", "Report", "Result", "Stop", "diff", "inspect", "plan", "plan_forward", "run", "run_forward",
           "verify"]

_SWITCH_SECONDS = 0.0005
"""Longest time that a thread keeps others from running Python while bytes are moved."""

Folder = str | PathLike[str]
Size = int | str
"""Bytes, or words such as "512MiB" and "5GB"."""
Progress = Callable[[int, int], None]
"""Called with (done, total)."""

Parameters = ParamSpec("Parameters")
Returned = TypeVar("Returned")


def _public(function: Callable[Parameters, Returned]) -> Callable[Parameters, Returned]:
    """A function of the interface: a keyword that it does not take is a UsageError, memory that the system refuses is a
    ResourceError."""
    signature = inspection.signature(function)

    @wraps(function)
    def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Returned:
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            unknown = next((name for name in kwargs if name not in signature.parameters), "")
            cure = did_you_mean(unknown, tuple(signature.parameters)) if unknown else ""
            raise UsageError(f"{function.__name__}(): {error}{cure}") from None
        with memory.granted():
            return function(*args, **kwargs)
    return call


@_public
def plan(source: Folder, destination: Folder | None = None, *, to: Format | None = None, tp: int = 1, pp: int = 1,
         dp: int = 1, template: Folder | None = None, dtype: Dtype = "keep", rope: Rope = "auto",
         nanotron_config: NanotronConfig = "auto", checkpoint_version: Version = "1.5", vocab_multiple: int = 1,
         vocab_size: int | None = None, max_shard_size: Size = Options.max_shard_size, tokenizer: Folder | None = None,
         allow: Collection[str] = (), verify: bool = False, source_sha256: str | None = None, io: Io = "auto",
         digests: Digests = "auto", overwrite: bool = False, restart: bool = False, break_lock: bool = False,
         max_memory: Size = Options.max_memory, workers: int | None = None, stop: Stop | None = None) -> Conversion:
    """Plan of a conversion; reads headers and configs only, and writes nothing.

    The keywords are the flags of the command line, explained in docs/options.md and in `options.Options`. Raises
    Refused with everything that is wrong with options, source and destination.
    """
    choices = locals()  # The parameters alone; a test holds them equal to the declared options.
    del choices["source"], choices["destination"], choices["stop"]
    options = Options.of(source=Path(source), destination=destination and Path(destination), **choices)
    root, notes = followed(options.source)
    like, more = (None, []) if options.template is None else followed(options.template)
    more += litter_notes(like) if like else ()
    conversion = plan_conversion(replace(options, source=root, template=like), stop)
    return replace(conversion, notes=(*notes, *more, *conversion.notes))


@_public
def run(conversion: Conversion, progress: Progress = lambda done, total: None, stop: Stop | None = None) -> Result:
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


@_public
def verify(source: Folder, copy: Folder, *, quick: bool = False, sample: float | str = 1.0, seed: int = 0,
           dtype: Dtype = "keep", vocab_size: int | None = None, allow: Collection[str] = (),
           edited: Collection[str] = (), max_memory: Size = Options.max_memory, workers: int | None = None,
           progress: Progress = lambda done, total: None, stop: Stop | None = None) -> Report:
    """Compare every weight of two checkpoints, of whatever formats, through the headers of their files.

    `progress(done, total)` counts parts of the work; the other keywords are the flags of the command line. Raises
    Refused with every difference (a DifferenceError each: file, parameter, first index, both values).
    """
    choices = locals()  # The parameters alone, as in `plan`.
    del choices["source"], choices["copy"], choices["progress"], choices["stop"]
    from stream_reshard.check.weights import lines
    from stream_reshard.check.weights import verify as compare
    options = VerifyOptions.of(**choices)
    (root, notes), (other, more) = followed(Path(source)), followed(Path(copy), is_copy=True)
    facts = compare(root, other, options, stop, progress)
    facts["notes"] = [*notes, *more, *litter_notes(root), *litter_notes(other), *facts["notes"]]
    return Report(facts, tuple(lines(facts)))


@_public
def plan_forward(source: Folder, copy: Folder, *, text: Folder | None = None, tokens: int = 128, seed: int = 0,
                 tolerance: float = 1e-4, plot: Folder | None = None, dtype: Dtype = "keep",
                 allow: Collection[str] = (), max_memory: Size = Options.max_memory,
                 workers: int | None = None) -> ForwardPlan:
    """Plan of a run of two checkpoints over the same tokens, with its memory; reads headers and configs only.

    The keywords are the flags of `verify --forward`. Raises Refused.
    """
    choices = locals()  # The parameters alone, as in `plan`.
    del choices["source"], choices["copy"]
    from stream_reshard.check import forward
    options = ForwardOptions.of(**choices)
    return forward.plan_forward(followed(Path(source))[0], followed(Path(copy), is_copy=True)[0], options)


@_public
def run_forward(plan: ForwardPlan, progress: Progress = lambda done, total: None,
                stop: Stop | None = None) -> ForwardResult:
    """Run both checkpoints, layer by layer, in float32 on the CPU; needs torch.

    `progress(done, total)` counts layers. Raises DifferenceError where the two do not go through the same steps;
    numbers that differ are for the result to say.
    """
    from stream_reshard.check import forward
    from stream_reshard.check.forward.report import ForwardResult
    begin = time.monotonic()
    comparison = forward.run_forward(plan, progress, stop)
    return ForwardResult(plan, comparison, time.monotonic() - begin, memory.peak_resident())


@_public
def inspect(folder: Folder, *, values: bool = False, stop: Stop | None = None) -> Report:
    """Contents of a checkpoint folder of either format: family, sizes, dtypes, topology, stages, versions, faults; with
    `values` every weight is read, and NaN and infinities are counted. Raises SourceError."""
    from stream_reshard.check.inspect import inspect as contents
    from stream_reshard.check.inspect import lines
    root, notes = followed(Path(folder))
    facts = contents(root, values, stop)
    facts["notes"] = [*notes, *facts["notes"]]
    return Report(facts, tuple(lines(facts)))


@_public
def diff(one: Folder, other: Folder) -> Report:
    """Differences between the layouts of two checkpoints of one model, tensor by tensor; its facts are {"same",
    "differences", "num_more", "notes"}. No weight is read. Raises Refused."""
    from stream_reshard.check.diff import diff as compare
    from stream_reshard.check.diff import lines
    (left, notes), (right, more) = followed(Path(one)), followed(Path(other))
    facts = compare(left, right) | {"notes": [*notes, *more, *litter_notes(left), *litter_notes(right)]}
    return Report(facts, tuple(lines(facts)))
