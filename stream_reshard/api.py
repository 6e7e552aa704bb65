"""The interface for programs, notebooks and the command line: plan, estimate, run, verify, inspect, diff::

    from stream_reshard import api
    conversion = api.plan("llama-7b", "llama-7b-tp4", tp=4, pp=2, max_memory="256MiB")
    print(conversion)                                          # its work, memory and disk
    result = api.run(conversion, progress=lambda done, total: print(f"{done / total:.0%}"))
    api.verify("llama-7b", "llama-7b-tp4")                     # raises Refused if any weight differs
    print(result.facts["peak_nbytes"])

Every result has `facts`, a dict for JSON with sizes in bytes, and `lines`, the facts as text for a person. Keywords are
the flags of the command line: max_memory="256MiB" is --max-memory 256MiB. In a folder of Nanotron's steps, latest.txt
is followed, as Nanotron does.

Every function raises the errors of `errors`: a StreamReshardError, whose text is meant for people, or Refused, which
holds all problems found.
"""
from __future__ import annotations

import inspect as inspection
import re
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import wraps
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from stream_reshard.convert.conversion import Conversion, plan_conversion, run_conversion
from stream_reshard.convert.report import Result
from stream_reshard.errors import StreamReshardError, UsageError
from stream_reshard.formats.nanotron.folder import litter_notes
from stream_reshard.formats.registry import followed
from stream_reshard.machine import memory
from stream_reshard.machine.kernel import io_counters
from stream_reshard.machine.stop import Stop
from stream_reshard.options import ForwardOptions, Options, VerifyOptions
from stream_reshard.options.conversion import Digests, Format, Io, NanotronConfig, Rope, Schedule, Version
from stream_reshard.options.declaring import did_you_mean, options_of
from stream_reshard.options.resources import Dtype
from stream_reshard.plan.plan import Job
from stream_reshard.report import Progress, Report, shown

if TYPE_CHECKING:
    from stream_reshard.check.forward import ForwardPlan
    from stream_reshard.check.forward.report import ForwardResult

__all__ = ["Conversion", "Report", "Result", "Stop", "diff", "estimate", "inspect", "plan", "plan_forward", "run",
           "run_forward", "verify"]


def __dir__() -> list[str]:
    """The public names alone: what a notebook offers."""
    return __all__


_SWITCH_SECONDS = 0.0005
"""Longest time, while bytes are moved, that a thread keeps the others from running Python."""

Folder = str | PathLike[str]
Size = int | str
"""A number of bytes, or text such as "512MiB" or "5GB"."""
Parameters = ParamSpec("Parameters")
Returned = TypeVar("Returned")


def _public(function: Callable[Parameters, Returned]) -> Callable[Parameters, Returned]:
    """A function of the interface: it raises UsageError for an unknown keyword, and ResourceError for memory that the
    system refuses."""
    signature = inspection.signature(function)

    @wraps(function)
    def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Returned:
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            unknown = next((name for name in kwargs if name not in signature.parameters), "")
            cure = did_you_mean(unknown, tuple(signature.parameters)) if unknown else ""
            raise UsageError(f"{function.__name__}(): {error}{cure}") from None
        try:
            with memory.granted():
                return function(*args, **kwargs)
        except StreamReshardError as error:
            if not _in_words_of_flags.get():
                error.reword(_as_keywords)
            raise
    return call


_in_words_of_flags: ContextVar[bool] = ContextVar("in_words_of_flags", default=False)


@contextmanager
def in_words_of_flags() -> Iterator[None]:
    """Meanwhile errors name options as flags (--tp 3) and not as keywords (tp=3)."""
    token = _in_words_of_flags.set(True)
    try:
        yield
    finally:
        _in_words_of_flags.reset(token)


_KEYWORDS = {own.flag: own.name for cls in (Options, VerifyOptions, ForwardOptions) for own in options_of(cls)}
_FLAG = re.compile(r"(--[a-z0-9]+(?:-[a-z0-9]+)*)(?: (\d+(?![\w.])|'[^']*'))?")


def _as_keywords(text: str) -> str:
    """A message with its flags spelled as keywords."""
    def spelled(match: re.Match[str]) -> str:
        if match[1] not in _KEYWORDS:
            return match[0]
        return _KEYWORDS[match[1]] + (f"={match[2]}" if match[2] else "")

    return _FLAG.sub(spelled, text)


@_public
def plan(source: Folder, destination: Folder | None = None, *, to: Format | None = None, tp: int = 1, pp: int = 1,
         dp: int = 1, layers: int | None = None, zero: int | None = None, schedule: Schedule = "saved",
         from_masters: bool = False, weights_only: bool = False, template: Folder | None = None,
         dtype: Dtype = "keep", rope: Rope = "auto", nanotron_config: NanotronConfig = "auto",
         checkpoint_version: Version = "1.5", vocab_multiple: int = 1, vocab_size: int | None = None,
         max_shard_size: Size = Options.max_shard_size, tokenizer: Folder | None = None, allow: Collection[str] = (),
         verify: bool = False, source_sha256: str | None = None, io: Io = "auto", digests: Digests = "auto",
         overwrite: bool = False, restart: bool = False, break_lock: bool = False,
         max_memory: Size = Options.max_memory, workers: int | None = None, stop: Stop | None = None) -> Conversion:
    """Plan of a conversion; reads headers and configs only, and writes nothing.

    The keywords are the flags of the command line, explained in docs/options.md and in `options.Options`. Raises
    Refused with every problem of options, source and destination.
    """
    choices = locals()  # Only the parameters; a test holds them equal to the declared options.
    del choices["source"], choices["destination"], choices["stop"]
    options = Options.of(source=Path(source), destination=destination and Path(destination), **choices)
    root, notes = followed(options.source)
    like, more = (None, []) if options.template is None else followed(options.template)
    more += litter_notes(like) if like else ()
    conversion = plan_conversion(replace(options, source=root, template=like), stop)
    return replace(conversion, notes=(*notes, *more, *conversion.notes))


@_public
def estimate(conversion: Conversion) -> Conversion:
    """The plan with an estimate of its time. For about a second SRC is read, and copied into a file without a name
    beside DST, which is gone afterwards. Raises SourceError or ResourceError where SRC cannot be read."""
    from stream_reshard.convert.estimate import with_estimate
    with _switching_soon():
        return with_estimate(conversion)


@_public
def run(conversion: Conversion, progress: Progress | bool = False, stop: Stop | None = None, *,
        check_progress: Progress | bool = False) -> Result:
    """Write the destination: whole, or not at all.

    `progress(done, total)` counts the bytes of durable target files. `stop.request()` in another thread ends the run
    with Interrupted; another run of the same plan resumes it. Raises SourceError for a source that changed,
    DestinationError, ResourceError (disk, I/O; resumable), LockedError, and with the option `verify` DifferenceError.
    """
    begin, io_before = time.monotonic(), io_counters()
    num_done = 0

    if conversion.options.destination is None:
        raise UsageError("the plan has no destination: give one to api.plan")

    def advance(job: Job) -> None:
        nonlocal num_done
        num_done += job.nbytes
        show(num_done, conversion.nbytes)

    with _switching_soon(), shown(progress, "B") as show, shown(check_progress, "part") as show_check:
        done = run_conversion(conversion, advance, stop, show_check)
    return Result(conversion, time.monotonic() - begin, memory.peak_resident(), io_counters(io_before), done)


@contextmanager
def _switching_soon() -> Iterator[None]:
    """Let each thread run Python for `_SWITCH_SECONDS` at most, so that a thread with a finished block waits little."""
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
           progress: Progress | bool = False, stop: Stop | None = None) -> Report:
    """Compare every weight of two checkpoints, of whatever formats, through the headers of their files.

    `progress(done, total)` counts parts of the work; the other keywords are the flags of `verify`. Raises Refused with
    every difference (a DifferenceError each: file, parameter, first index, both values).
    """
    choices = locals()  # Only the parameters, as in `plan`.
    del choices["source"], choices["copy"], choices["progress"], choices["stop"]
    from stream_reshard.check.weights import lines
    from stream_reshard.check.weights import verify as compare
    options = VerifyOptions.of(**choices)
    (root, notes), (other, more) = followed(Path(source)), followed(Path(copy), is_copy=True)
    with shown(progress, "part") as show:
        facts = compare(root, other, options, stop, show)
    facts["notes"] = [*notes, *more, *litter_notes(root), *litter_notes(other), *facts["notes"]]
    return Report(facts, tuple(lines(facts)))


@_public
def plan_forward(source: Folder, copy: Folder, *, text: Folder | None = None, tokens: int = 128, seed: int = 0,
                 tolerance: float = 1e-4, plot: Folder | None = None, dtype: Dtype = "keep",
                 allow: Collection[str] = (), max_memory: Size = Options.max_memory,
                 workers: int | None = None) -> ForwardPlan:
    """Plan of forward passes of two checkpoints over the same tokens; reads headers and configs only.

    The keywords are the flags of `verify --forward`. Raises Refused.
    """
    choices = locals()  # Only the parameters, as in `plan`.
    del choices["source"], choices["copy"]
    from stream_reshard.check import forward
    options = ForwardOptions.of(**choices)
    return forward.plan_forward(followed(Path(source))[0], followed(Path(copy), is_copy=True)[0], options)


@_public
def run_forward(plan: ForwardPlan, progress: Progress | bool = False, stop: Stop | None = None) -> ForwardResult:
    """Run both checkpoints, layer by layer, in float32 on the CPU; needs torch.

    `progress(done, total)` counts layers. Raises DifferenceError for models with different steps; the result holds the
    differences between their values.
    """
    from stream_reshard.check import forward
    from stream_reshard.check.forward.report import ForwardResult
    begin = time.monotonic()
    with shown(progress, "layer") as show:
        comparison = forward.run_forward(plan, show, stop)
    return ForwardResult(plan, comparison, time.monotonic() - begin, memory.peak_resident())


@_public
def inspect(folder: Folder, *, values: bool = False, stop: Stop | None = None) -> Report:
    """Contents of a checkpoint folder of any format: family, sizes, dtypes, topology, stages, versions, faults. With
    `values` every weight is read, and NaN and infinities are counted. Raises SourceError."""
    from stream_reshard.check.inspect import inspect as contents
    from stream_reshard.check.inspect_lines import lines
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
