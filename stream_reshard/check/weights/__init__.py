"""Verify: prove that two folders of any formats and topologies hold the same model, in bounded memory.

- checkpoint:   a checkpoint as matrices that can be read in blocks
- of_layout:    the parameters of a layout, for formats that read whole tensors
- hugging_face: a Hugging Face folder as such a checkpoint
- meta:         a folder of Meta's parts as such a checkpoint
- groups:       the files of one Nanotron parameter, by Nanotron's own rules
- nanotron:     a Nanotron folder as such a checkpoint, through the slice metadata in its own headers
- compare:      one parameter of both checkpoints, element by element
- files:        missing files, extra files, files of the manifest
- agreement:    settings, dtypes, digests
- token_ids:    ids of special tokens
- scope:        scope of the comparison: vocabulary, cast, sample, accepted names
- structure:    everything but the values of weights
- start:        weights from which a training by config.yaml starts
- training:     config.yaml against the weights beside it
- side:         one of the two folders, of any format
- tasks:        the parts of the comparison that read files, and their execution
- states:       the training state beside the weights: moments, masters, schedule

The planner's slices and arithmetic are not used here, so that a wrong plan cannot agree with itself. Shared with it are
the table of names (`architectures`), the reader of files, and Nanotron's balancing of stages.
"""
from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from stream_reshard.check.weights.checkpoint import Checkpoint
from stream_reshard.check.weights.compare import Compared
from stream_reshard.check.weights.files import FilesOfManifest
from stream_reshard.check.weights.scope import cast_to, check_names, rule_of, true_vocab_size, with_vocabulary
from stream_reshard.check.weights.structure import Found, compare_structure
from stream_reshard.check.weights.side import Side, open_copy, open_source
from stream_reshard.check.weights.states.presence import with_states
from stream_reshard.check.weights.states.tasks import byte_tasks, state_tasks
from stream_reshard.check.weights.tasks import Task, digest_tasks, run, shared, weight_tasks
from stream_reshard.errors import DifferenceError, Problems, ResourceError
from stream_reshard.machine import memory
from stream_reshard.machine.stop import Stop
from stream_reshard.options import VerifyOptions
from stream_reshard.report import layers_lines, note_lines
from stream_reshard.storage.dtypes import TORCH_DTYPES
from stream_reshard.storage.small_files import MAX_JSON_NBYTES

__all__ = ["lines", "verify"]

MAX_DIFFERENCES = 1000
"""Limit on kept differences; the rest are counted."""


def verify(source: Path, copy: Path, options: VerifyOptions = VerifyOptions(), stop: Stop | None = None,
           progress: Callable[[int, int], None] = lambda done, total: None) -> dict[str, Any]:
    """Compare `copy` with `source`; returns counts. `progress(done, total)` counts the parts of the work.

    Raises Refused with every difference found (each a DifferenceError: file, parameter, first index, both values), or
    with the SourceErrors of a source that is refused; ResourceError if `max_memory` is too small; UsageError for
    unknown names in `options`.
    """
    stop = stop or Stop()
    allowed = options.plan.allowed if options.plan else options.allowed_memory
    problems, found = Problems(), Found()
    copy_side = open_copy(copy, _parse_limit(options, allowed), found.differences, options.allow)
    source_side = open_source(source, _parse_limit(options, allowed), problems, options.allow, copy_side)
    _raise_resource_error(problems)
    original = with_vocabulary(problems.required(source_side.checkpoint), options)
    original, copy_side = with_states(original, copy_side, options.allow, _parse_limit(options, allowed),
                                      found.differences)
    check_names(copy_side, options)
    manifest_files = compare_structure(original, copy_side, options, allowed, found)
    _raise_resource_error(found.differences)
    budget = options.plan or _budget(options, allowed)
    tasks, num_tasks = _tasks(original, copy_side, manifest_files, options, budget, stop)
    with stop.awaited():
        counts = _counted(run(tasks, num_tasks, budget.num_workers, stop, progress), found.differences)
    differences = Problems(DifferenceError(str(problem), kind=problem.kind, num_more=problem.num_more)
                           for problem in found.differences)
    compared = differences.required(copy_side.checkpoint)
    return {"equal": True, "num_files": len(compared.paths), "num_layers": compared.config.num_hidden_layers,
            "whole_num_layers": compared.config.whole_num_hidden_layers,
            "num_elements": compared.num_elements(true_vocab_size(original, compared)),
            "num_elements_compared": counts["elements"], "num_digests": counts["digests"],
            "state": _state_facts(original, compared, counts["states"], options),
            "has_manifest": copy_side.manifest is not None, "cast": _cast_text(original, copy_side, options),
            "accepted": found.accepted, "notes": found.notes,
            "config_yaml_was_read": True,  # Always; a key of the JSON document is never removed.
            "quick": options.quick, "sample": options.sample, "seed": options.seed}


def _counted(results: Iterator[Compared], differences: Problems) -> Counter[str]:
    """The sums over all tasks; the differences that they found go to `differences`, up to MAX_DIFFERENCES."""
    counts: Counter[str] = Counter()
    for compared in results:
        counts.update(elements=compared.num_elements, states=compared.num_states, digests=compared.is_digest)
        if compared.difference and len(differences) < MAX_DIFFERENCES:
            differences.append(compared.difference)
        else:
            counts["more"] += compared.difference is not None
    if counts["more"]:
        differences.append(DifferenceError(f"and {counts['more']} more"))
    return counts


def lines(facts: dict[str, Any]) -> Iterator[str]:
    """The result of `verify` as lines for a person."""
    if facts["quick"]:
        yield f"verified structure of {facts['num_files']} files, no weight compared"
    elif facts["sample"] < 1:
        yield (f"verified {facts['num_files']} files, {facts['num_elements_compared']} of {facts['num_elements']} "
               f"weights (sample with seed {facts['seed']}): all equal")
    else:
        yield f"verified {facts['num_files']} files, {facts['num_elements']} weights: all equal"
    if facts["state"]:
        yield _state_line(facts["state"])
    yield (f"digests  {facts['num_digests']} files, equal to those in the manifest" if facts["has_manifest"] else
           "digests  not compared: the folder has no manifest of this tool")
    yield from layers_lines(facts)
    if facts["cast"]:
        yield f"cast     {facts['cast']}"
    yield from (f"accepted {text}" for text in facts["accepted"])
    yield from note_lines(facts)


def _state_facts(source: Checkpoint, copy: Checkpoint, num_compared: int, options: VerifyOptions
                 ) -> dict[str, Any] | None:
    """Facts of the training state of the copy; None where it has none."""
    if copy.state is None:
        return None
    return {"step": copy.state.step, "kinds": list(copy.state.kinds), "in_source": source.state is not None,
            "num_compared": num_compared, "num_files": len(copy.state.paths),
            "checksums": _checks_bytes(options)}


def _state_line(facts: dict[str, Any]) -> str:
    step, kinds = f"state    of step {facts['step']:g}", ", ".join(facts["kinds"])
    compared = f"{facts['num_compared']} numbers in {kinds}: all equal" if facts["num_compared"] else "not compared"
    checks = f", checksums of {facts['num_files']} files right" if facts["checksums"] else ""
    return f"{step}, {compared}{checks}"


def _checks_bytes(options: VerifyOptions) -> bool:
    """True if whole files of the training state are read for their checksums."""
    return not options.quick and options.sample >= 1


def _parse_limit(options: VerifyOptions, allowed: int) -> int:
    """Bytes of JSON that may be parsed at once in the memory that is left now."""
    return MAX_JSON_NBYTES * 8 if options.plan else memory.parse_limit(allowed, memory.resident())


def _raise_resource_error(problems: Problems) -> None:
    """Raises the first ResourceError among the problems: the comparison is incomplete, so it proves no difference."""
    for problem in problems:
        if isinstance(problem, ResourceError):
            raise problem


def _budget(options: VerifyOptions, allowed: int) -> memory.MemoryPlan:
    budget = memory.plan_memory(allowed, memory.held(), options.num_workers, memory.VERIFY_BUFFERS)
    for problem in budget.problems("the comparison"):
        raise problem
    return budget


def _tasks(source: Checkpoint, copy_side: Side, manifest_files: FilesOfManifest | None, options: VerifyOptions,
           budget: memory.MemoryPlan, stop: Stop) -> tuple[Iterator[Task], int]:
    """(the parts of the comparison that read files, their number)."""
    copy, tasks, num_tasks = copy_side.checkpoint, iter(list[Task]()), 0
    if manifest_files is not None:
        for path in (*map(os.path.normpath, options.edited), *(copy.paths if copy and options.sample < 1 else ())):
            manifest_files.take(path)  # Its digest is not compared.
        num_tasks = manifest_files.num_there
    if copy is not None and not options.quick:
        rule = rule_of(source, copy, copy_side, options, budget.block_nbytes // 4)
        tasks = weight_tasks(source, copy, rule, manifest_files, budget.block_nbytes, stop)
        num_tasks += sum(1 for _ in shared(source, copy))
        if copy.state is not None:
            of_state = partial(state_tasks, source, copy, rule, stop)
            of_bytes = partial(byte_tasks, copy, budget.block_nbytes, stop) if _checks_bytes(options) else tuple
            tasks = chain(tasks, of_bytes(), of_state())
            num_tasks += sum(1 for _ in chain(of_bytes(), of_state()))
    if manifest_files is not None:
        tasks = chain(tasks, digest_tasks(copy_side.root, manifest_files, budget.block_nbytes, stop))
    return tasks, num_tasks


def _cast_text(source: Checkpoint, copy_side: Side, options: VerifyOptions) -> str | None:
    """The cast of the source for the comparison, and its origin (manifest or option); None without a cast."""
    dtype = cast_to(copy_side, options)
    others = {source.weights.dtype_of(name) for name in source.weights} - {dtype}
    if dtype is None or not others:
        return None
    names = " and ".join(sorted(TORCH_DTYPES.get(name, name) for name in others))
    origin = "DST's manifest" if options.dtype == "keep" else "--dtype"
    return f"{names} to {TORCH_DTYPES[dtype]}, by {origin}"
