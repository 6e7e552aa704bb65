"""Plan: a source layout against a target layout. Pure data, the same for the same input, proved before it runs.

A plan holds a few bytes per group of target files. What a group is cut from, its files, its slices are derived when its
job runs; a mixture of experts with 1T parameters has 850,000 slices.
"""
from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import overload

from stream_reshard.errors import StreamReshardError
from stream_reshard.formats.layout import Layout
from stream_reshard.plan.alignment import Alignment
from stream_reshard.plan.proof import Survey
from stream_reshard.storage.header import TensorFile


@dataclass(frozen=True)
class Job:
    """One unit of work: all files cut from the same parameters, plus groups interleaved with them in the source, so
    that each source byte is read once. Idempotent, and independent of other jobs; copies are derived when it runs."""

    files: tuple[TensorFile, ...]
    parameters: tuple[str, ...]
    """Names of the parameters that these files hold, in the order of the source's bytes; of a single file's own."""

    @property
    def nbytes(self) -> int:
        """Bytes it writes, headers included."""
        return sum(file.nbytes for file in self.files)


@dataclass(frozen=True, eq=False)
class Plan:
    """A source layout against a target layout. Two plans with one digest are one plan."""

    source: Layout
    target: Layout
    order: array[int] = field(repr=False)
    """The target's groups in the order of the source's bytes."""
    starts: array[int] = field(repr=False)
    """Index in `order` of the first group of each job."""
    nbytes: int
    """Bytes of all target files."""
    largest_job_nbytes: int
    """Bytes that the largest job writes."""
    casts: Mapping[tuple[str, str], int]
    """Number of parameters per (source dtype, target dtype) that changes."""
    dtypes: Mapping[str, int]
    """Bytes of target tensors per dtype."""
    digest: str
    """sha256 of everything that decides the output's bytes."""

    @property
    def jobs(self) -> Sequence[Job]:
        """Every job, each derived when its turn comes, in the order of the source's bytes."""
        return _Jobs(self)


class _Jobs(Sequence[Job]):
    """The jobs of a plan."""

    def __init__(self, plan: Plan):
        self._plan = plan

    def __len__(self) -> int:
        return len(self._plan.starts)

    @overload
    def __getitem__(self, index: int) -> Job: ...

    @overload
    def __getitem__(self, index: slice) -> list[Job]: ...

    def __getitem__(self, index: int | slice) -> Job | list[Job]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        plan, number = self._plan, range(len(self))[index]
        end = plan.starts[number + 1] if number + 1 < len(self) else len(plan.order)
        groups = [plan.target.group(position) for position in plan.order[plan.starts[number]:end]]
        files = tuple(file for group in groups for file in plan.target.files_of(group))
        # One file is written from its first byte to its last; for several the source is read in its order.
        read = plan.target if len(files) == 1 else plan.source
        numbers = sorted((number for group in groups for number in group.numbers),
                         key=lambda number: min(read.locations_of(number)))
        return Job(files, tuple(plan.target.model.parameter(number).name for number in numbers))


def make_plan(source: Layout, target: Layout) -> Plan:
    """Overlap two layouts of one model, and prove that every target byte is written exactly once.

    Headers of the target are padded so that blocks can be shared (`alignment`). Raises StreamReshardError, which is a
    fault of the layouts and not of the user, where the proof fails.
    """
    alignment = Alignment(source, target)
    survey = Survey(alignment, target.aligned(alignment))
    if survey.faults:
        raise StreamReshardError("this is a fault of stream_reshard, nothing was written: "
                                 + "; ".join(survey.faults[:5]))
    order = survey.order()
    starts = survey.starts(order)
    return Plan(source, survey.target, order, starts, survey.nbytes, survey.largest_job_nbytes(order, starts),
                survey.casts(), survey.dtypes(), survey.digest())


def coverage_faults(plan: Plan) -> Iterator[str]:
    """Every target element that is not written exactly once, and every source element not used exactly once."""
    yield from Survey(Alignment(plan.source, plan.target), plan.target).faults
