"""Plan: a source layout against a target layout. Pure data, the same for the same input, proved before it runs.

A plan holds a few bytes per group of target files. The files and slices of a group are derived when its job runs,
because a mixture of experts with 1T parameters has 850,000 slices.
"""
from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
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
    that each source byte is read once. Idempotent, and independent of other jobs."""

    files: tuple[TensorFile, ...]
    index: int
    """Position among the jobs of its plan."""
    parameters: tuple[str, ...]
    """Names of the parameters in these files, in the order of the source's bytes; in that of the target's where the job
    has a single file."""

    @property
    def nbytes(self) -> int:
        """Bytes that the job writes, headers included."""
        return sum(file.nbytes for file in self.files)


@dataclass(frozen=True, eq=False)
class Plan:
    """A source layout against a target layout. Plans with equal digests write the same output."""

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
    """Count of cast parameters per (source dtype, target dtype)."""
    dtypes: Mapping[str, int]
    """Bytes of target tensors per dtype."""
    digest: str
    """sha256 of everything that decides the output's bytes."""

    @property
    def jobs(self) -> Sequence[Job]:
        """Every job, in the order of the source's bytes; each is derived when it is asked for."""
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
        plan, index = self._plan, range(len(self))[index]
        stop = plan.starts[index + 1] if index + 1 < len(self) else len(plan.order)
        groups = [plan.target.group(position) for position in plan.order[plan.starts[index]:stop]]
        files = tuple(file for group in groups for file in plan.target.files_of(group))
        # One file is written from its first byte to its last; for several files the source is read in its order.
        layout = plan.target if len(files) == 1 else plan.source
        numbers = sorted((number for group in groups for number in group.numbers),
                         key=lambda number: min(layout.locations_of(number)))
        return Job(files, index, tuple(plan.target.model.parameter(number).name for number in numbers))


def make_plan(source: Layout, target: Layout) -> Plan:
    """Overlap two layouts of one model, and prove that every target byte is written exactly once.

    Headers of the target are padded so that blocks can be cloned (`alignment`). Raises StreamReshardError where the
    proof fails: a fault of the layouts, not of the user.
    """
    alignment = Alignment(source, target)
    survey = Survey(alignment, target.aligned(alignment))
    if survey.faults:
        raise StreamReshardError("this is a fault of stream_reshard, nothing was written: "
                                 + "; ".join(survey.faults[:5]) + "; please report it")
    order = survey.order()
    starts = survey.starts(order)
    return Plan(source, survey.target, order, starts, survey.nbytes, survey.largest_job_nbytes(order, starts),
                survey.casts(), survey.dtypes(), survey.digest())
