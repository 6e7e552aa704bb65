"""Plan: a source layout against a target layout. Pure data, the same for the same input, proved before it runs."""
from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from stream_reshard.alignment import begin_for, wishes_of
from stream_reshard.box import Box, tiling_fault
from stream_reshard.errors import StreamReshardError
from stream_reshard.header import StoredTensor, TensorFile
from stream_reshard.layouts.base import Fill, Layout, Slice


@dataclass(frozen=True)
class Job:
    """The work that writes the files which share parameters with each other and with no other file, so that each source
    byte is read once. Idempotent, and independent of every other job; its copies are derived when it runs."""

    files: tuple[TensorFile, ...]
    parameters: tuple[str, ...]
    """Names of the parameters that these files hold, in the order of their places."""

    @property
    def nbytes(self) -> int:
        """Bytes it writes, headers included."""
        return sum(file.nbytes for file in self.files)


@dataclass(frozen=True)
class Plan:
    """What goes where."""

    source: Layout
    target: Layout
    jobs: tuple[Job, ...]

    def targets_of(self, job: Job, parameter: str) -> tuple[Slice, ...]:
        """The slices of a parameter that stand in the files of a job."""
        paths = {file.path for file in job.files}
        return tuple(held for held in self.target.slices.get(parameter, ()) if held.tensor.file in paths)

    def casts(self) -> dict[tuple[str, str], int]:
        """Number of parameters per (source dtype, target dtype) that changes."""
        counts: dict[tuple[str, str], int] = defaultdict(int)
        for name in self.target.slices:
            pair = self.source.dtype_of(name), self.target.dtype_of(name)
            counts[pair] += pair[0] != pair[1]
        return {pair: count for pair, count in counts.items() if count}

    @cached_property
    def digest(self) -> str:
        """sha256 of everything that decides the output's bytes; two plans with one digest are one plan."""
        def described(layout: Layout) -> Iterator[object]:
            for file in layout.files:
                yield [file.path, dict(sorted(file.metadata)),
                       [[t.key, t.dtype, t.shape, t.begin] for t in file.tensors]]
            for name, held in layout.slices.items():
                for part in held:
                    yield [name, part.region.start, part.region.stop, part.tensor.file, part.place.start, part.order]

        text = json.dumps([list(described(self.source)), list(described(self.target))])
        return hashlib.sha256(text.encode()).hexdigest()


def make_plan(source: Layout, target: Layout) -> Plan:
    """Overlap two layouts of one model, and prove that every target byte is written exactly once.

    Raises StreamReshardError, which is a fault of the layouts and not of the user, where the proof fails.
    """
    target = _aligned(source, target)
    plan = Plan(source, target, tuple(_jobs(source, target)))
    faults = list(coverage_faults(plan))
    if faults:
        raise StreamReshardError("this is a fault of stream_reshard, nothing was written: " + "; ".join(faults[:5]))
    return plan


def coverage_faults(plan: Plan) -> Iterator[str]:
    """Every target element that is not written exactly once, and every source element not used exactly once."""
    places: dict[tuple[str, str], list[Box]] = defaultdict(list)
    yield from _region_faults(plan)
    for held in plan.target.slices.values():
        for part in held:
            places[part.tensor.file, part.tensor.key].append(part.place)
    for fills in plan.target.fills.values():
        for fill in fills:
            places[fill.tensor.file, fill.tensor.key].append(fill.place)
    for tensor in plan.target.tensors():
        if fault := tiling_fault(places[tensor.file, tensor.key], Box.whole(tensor.shape)):
            yield f"{tensor.file}: {fault}"
    done = [file.path for job in plan.jobs for file in job.files]
    if sorted(done) != sorted(file.path for file in plan.target.files):
        yield "the jobs do not write every file once"


def _region_faults(plan: Plan) -> Iterator[str]:
    for layout in (plan.source, plan.target):
        for parameter in plan.target.model.stored():
            held = layout.slices.get(parameter.name, ())
            if fault := tiling_fault([part.region for part in held], parameter.whole):
                yield f"{parameter.name} in {layout.format}: {fault}"


def _jobs(source: Layout, target: Layout) -> Iterator[Job]:
    """Target files that share a parameter are one job; jobs come in the order of the source's bytes."""
    leader = {file.path: file.path for file in target.files}

    def find(path: str) -> str:
        while leader[path] != path:
            path = leader[path]
        return path

    parts: dict[str, tuple[Slice | Fill, ...]] = {
        name: (*held, *target.fills.get(name, ())) for name, held in target.slices.items()}
    for held in parts.values():
        for part in held[1:]:
            leader[find(part.tensor.file)] = find(held[0].tensor.file)
    parameters: dict[str, list[str]] = defaultdict(list)
    for name, held in parts.items():
        parameters[find(held[0].tensor.file)].append(name)
    files: dict[str, list[TensorFile]] = defaultdict(list)
    for file in target.files:
        files[find(file.path)].append(file)

    def place(path: str) -> tuple[str, int]:
        return min((part.tensor.file, part.tensor.begin) for name in parameters[path] for part in source.slices[name])

    for path in sorted(files, key=place):
        yield Job(tuple(files[path]), tuple(parameters[path]))


def _aligned(source: Layout, target: Layout) -> Layout:
    """The target with the data of each file where its headers should let them begin."""
    shifts: dict[str, int] = {}
    for job in _jobs(source, target):
        pairs = [(source.slices[name], target.slices[name]) for name in job.parameters]
        begins = [part.tensor.begin for held, _ in pairs for part in held]
        for file, wishes in zip(job.files, wishes_of(job.files, pairs)):
            least = file.tensors[0].begin
            shifts[file.path] = begin_for(wishes, begins, least) - least

    def moved(tensor: StoredTensor) -> StoredTensor:
        return replace(tensor, begin=tensor.begin + shifts[tensor.file])

    return replace(
        target,
        files=tuple(replace(file, tensors=tuple(map(moved, file.tensors))) for file in target.files),
        slices={name: tuple(replace(part, tensor=moved(part.tensor)) for part in held)
                for name, held in target.slices.items()},
        fills={name: tuple(replace(part, tensor=moved(part.tensor)) for part in held)
               for name, held in target.fills.items()})
