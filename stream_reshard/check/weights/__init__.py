"""Verify: prove that two folders hold the same model, whatever their formats and topologies, in bounded memory.

- checkpoint:   a checkpoint as matrices that can be read in blocks
- hugging_face: a Hugging Face folder as such a checkpoint
- groups:       the files of one Nanotron parameter, by Nanotron's own rules
- nanotron:     a Nanotron folder as such a checkpoint, through the slice metadata in its own headers
- compare:      one parameter of both, element by element
- files:        files that must be there, and files that must not
- agreement:    settings, dtypes, digests
- token_ids:    ids of special tokens
- how:          scope of the comparison, by the wish of a user
- structure:       everything but the weights
- start:        weights from which a training by config.yaml starts
- training:     config.yaml against the weights beside it
- side:         one of the two folders, whatever its format
- tasks:        the parts that read files, and running them

Nothing here uses the planner's slices or arithmetic, so that a wrong plan cannot agree with itself. What is shared is
the table of names (`architectures`), the reader of files, and Nanotron's balancing of stages.
"""
from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from stream_reshard.check.weights.checkpoint import Checkpoint
from stream_reshard.check.weights.compare import compared_as, is_widening
from stream_reshard.check.weights.files import FilesOfManifest
from stream_reshard.check.weights.scope import cast_to, check_names, rule_of, true_vocab_size, with_vocabulary
from stream_reshard.check.weights.structure import Found, compare_structure
from stream_reshard.check.weights.side import Side, open_side
from stream_reshard.check.weights.tasks import Task, digest_tasks, run, shared, weight_tasks
from stream_reshard.check.weights.training import has_yaml
from stream_reshard.errors import DifferenceError, Problems, ResourceError
from stream_reshard.machine import memory
from stream_reshard.machine.stop import Stop
from stream_reshard.options import VerifyOptions
from stream_reshard.report import note_lines
from stream_reshard.storage.dtypes import TORCH_DTYPES
from stream_reshard.storage.small_files import MAX_JSON_NBYTES

__all__ = ["lines", "verify"]

MAX_DIFFERENCES = 1000
"""Differences that are kept; the rest are counted: where every weight differs, their number says it."""


def verify(source: Path, copy: Path, options: VerifyOptions = VerifyOptions(), stop: Stop | None = None,
           progress: Callable[[int, int], None] = lambda done, total: None) -> dict[str, Any]:
    """Compare `copy` with `source`; returns counts. `progress(done, total)` counts the parts of the work.

    Raises Refused with every difference found (each a DifferenceError: file, parameter, first index, both values), or
    with SourceErrors where the source itself is refused; ResourceError where `max_memory` is too small; UsageError for
    names in `options` that mean nothing.
    """
    stop = stop or Stop()
    allowed = options.plan.allowed if options.plan else options.allowed_memory
    problems, found = Problems(), Found()
    original = open_side(source, _parse_limit(options, allowed), problems, options.allow)
    _raise_limits(problems)
    problems.raise_if_any()
    original = with_vocabulary(original, options)
    other = open_side(copy, _parse_limit(options, allowed), found.differences, options.allow, is_copy=True)
    check_names(other, options)
    told = compare_structure(original, other, options, allowed, found)
    _raise_limits(found.differences)
    budget = options.plan or _budget(original, other, options, allowed)
    num_elements = num_digests = num_more = 0
    tasks, num_tasks = _tasks(original, other, told, options, budget, stop)
    with stop.awaited():
        for task in run(tasks, num_tasks, budget.num_workers, stop, progress):
            num_elements, num_digests = num_elements + task.num_elements, num_digests + task.is_digest
            if task.difference and len(found.differences) < MAX_DIFFERENCES:
                found.differences.append(task.difference)
            else:
                num_more += task.difference is not None
    if num_more:
        found.differences.append(DifferenceError(f"and {num_more} more"))
    Problems([DifferenceError(str(problem), kind=problem.kind, num_more=problem.num_more)
              for problem in found.differences]).raise_if_any()
    assert original.checkpoint and other.checkpoint, "what could not be opened has problems"
    return {"equal": True, "num_files": len(other.checkpoint.paths),
            "num_elements": other.checkpoint.num_elements(true_vocab_size(original.checkpoint, other.checkpoint)),
            "num_elements_compared": num_elements, "num_digests": num_digests,
            "has_manifest": other.manifest is not None, "cast": _cast_text(original.checkpoint, other, options),
            "accepted": found.accepted, "notes": found.notes, "config_yaml_was_read": has_yaml(),
            "quick": options.quick, "sample": options.sample, "seed": options.seed}


def lines(facts: dict[str, Any]) -> Iterator[str]:
    """The result of `verify` as lines for a person."""
    if facts["quick"]:
        yield f"verified structure of {facts['num_files']} files, no weight compared"
    elif facts["sample"] < 1:
        yield (f"verified {facts['num_files']} files, {facts['num_elements_compared']} of {facts['num_elements']} "
               f"weights (sample with seed {facts['seed']}): all equal")
    else:
        yield f"verified {facts['num_files']} files, {facts['num_elements']} weights: all equal"
    yield (f"digests  {facts['num_digests']} files as the manifest says" if facts["has_manifest"] else
           "digests  none: the folder has no manifest of this tool")
    if facts["cast"]:
        yield f"cast     {facts['cast']}"
    yield from (f"accepted {text}" for text in facts["accepted"])
    yield from note_lines(facts)
    if not facts["config_yaml_was_read"]:
        yield "note     config.yaml was not read, only its digest compared: PyYAML is not installed"


def _parse_limit(options: VerifyOptions, allowed: int) -> int:
    """Bytes of JSON that may be parsed at once, in what is left of the memory now."""
    return MAX_JSON_NBYTES * 8 if options.plan else memory.parse_limit(allowed, memory.resident())


def _raise_limits(problems: Problems) -> None:
    """Raises a ResourceError that is among the problems: nothing is known then, least of all a difference."""
    for problem in problems:
        if isinstance(problem, ResourceError):
            raise problem


def _budget(original: Side, other: Side, options: VerifyOptions, allowed: int) -> memory.MemoryPlan:
    source, copy, casts = original.checkpoint, other.checkpoint, False
    if source is not None and copy is not None and not options.quick:
        rule = rule_of(source, copy, other, options, 0)
        pairs = ((source.weights.dtype_of(name), compared_as(name, source, copy, rule))
                 for name in shared(source, copy))
        casts = any(theirs != dtype and not is_widening(theirs, dtype) for theirs, dtype in pairs)
    budget = memory.plan_memory(allowed, memory.resident(), options.num_workers, casts, memory.VERIFY_BUFFERS)
    for problem in budget.problems("the comparison"):
        raise problem
    return budget


def _tasks(original: Side, other: Side, told: FilesOfManifest | None, options: VerifyOptions, budget: memory.MemoryPlan,
           stop: Stop) -> tuple[Iterator[Task], int]:
    """(the parts of the comparison that read files, their number)."""
    source, copy = original.checkpoint, other.checkpoint
    left_out = [*map(os.path.normpath, options.edited), *(copy.paths if copy and options.sample < 1 else ())]
    num_digests = 0
    if told is not None:
        for path in left_out:
            told.take(path)
        num_digests = told.num_there
    if source is None or copy is None or options.quick:
        return _then_digests(iter(()), other, told, budget, stop), num_digests
    rule = rule_of(source, copy, other, options, budget.block_nbytes // 4)
    tasks = weight_tasks(source, copy, rule, told, budget.block_nbytes, stop)
    return _then_digests(tasks, other, told, budget, stop), num_digests + sum(1 for _ in shared(source, copy))


def _then_digests(tasks: Iterator[Task], other: Side, told: FilesOfManifest | None, budget: memory.MemoryPlan,
                  stop: Stop) -> Iterator[Task]:
    yield from tasks
    if told is not None:
        yield from digest_tasks(other.root, told, budget.block_nbytes, stop)


def _cast_text(source: Checkpoint, other: Side, options: VerifyOptions) -> str | None:
    """The cast of the source for the comparison, and what asked for it: manifest or option; None without a cast."""
    dtype = cast_to(other, options)
    others = {source.weights.dtype_of(name) for name in source.weights} - {dtype}
    if dtype is None or not others:
        return None
    names = " and ".join(sorted(TORCH_DTYPES.get(name, name) for name in others))
    who = "DST's manifest" if options.dtype == "keep" else "--dtype"
    return f"{names} to {TORCH_DTYPES[dtype]}, as {who} says"
