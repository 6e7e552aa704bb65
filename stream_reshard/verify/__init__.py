"""Verify: prove that two folders hold the same model, whatever their formats and topologies, in bounded memory.

- checkpoint:   a checkpoint as matrices that can be read by rows
- hugging_face: a Hugging Face folder as such
- nanotron:     a Nanotron folder as such, through the slice metadata in its own headers and Nanotron's own rules
- compare:      one parameter of both, element by element
- agreement:    configs, file sets, manifests
- token_ids:    ids of special tokens
- side:         one of the two folders, whatever its format
- tasks:        the parts that read files, and running them

Nothing here uses the planner's slices or arithmetic, so that a wrong plan cannot agree with itself. What is shared is
the table of names (`architectures`), the reader of files, and Nanotron's balancing of stages.
"""
from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stream_reshard import memory
from stream_reshard.errors import DifferenceError, Problems, ResourceError, StreamReshardError, UsageError, quoted
from stream_reshard.layouts.base import TORCH_DTYPES
from stream_reshard.layouts.nanotron_config import NEUTRAL
from stream_reshard.layouts.limits import ALLOWABLE
from stream_reshard.layouts.nanotron import STAGES
from stream_reshard.manifest import MAX_MANIFEST_NBYTES
from stream_reshard.stop import Stop
from stream_reshard.verify.agreement import (
    WITHOUT_EFFECT, config_differences, file_set_differences, has_yaml, parameter_differences, training_config_problems)
from stream_reshard.verify.checkpoint import Checkpoint
from stream_reshard.verify.compare import Rule, shape_difference
from stream_reshard.verify.nanotron import topology_of
from stream_reshard.verify.side import Side, open_side
from stream_reshard.verify.tasks import Task, digest_tasks, run, shared, weight_tasks
from stream_reshard.verify.token_ids import id_differences

PADDING = "padding"
"""What `allow` calls padding rows that are not zero: Nanotron itself leaves them to chance."""


@dataclass(frozen=True)
class How:
    """What of two checkpoints is compared, and with what means."""

    max_memory: int = memory.DEFAULT_ALLOWED
    """Limit on the peak resident set of the process tree, in bytes."""
    num_workers: int | None = None
    """Parts that are compared at the same time. None: as many as measured best."""
    quick: bool = False
    """Compare structure, configs and digests only; no weight of the source is read."""
    sample: float = 1.0
    """Part of the weights that is compared, above 0; below 1, digests of tensor files are left out too."""
    seed: int = 0
    """Chooses the sample."""
    dtype: str = "keep"
    """What the source is cast to before it is compared; `keep` also takes the word of the copy's manifest."""
    allow: tuple[str, ...] = ()
    """Names of settings that may differ, beside those that the copy's manifest names."""
    edited: tuple[str, ...] = ()
    """Paths of files in the copy that were edited on purpose: their digests are not compared."""
    ignored: tuple[str, ...] = ()
    """Paths in the copy that are not part of it."""
    is_own: bool = False
    """Whether both folders were read or written by this very run: their small files need no cap then."""


def verify(source: Path, copy: Path, how: How = How(), stop: Stop | None = None,
           progress: Callable[[int, int], None] = lambda done, total: None) -> dict[str, Any]:
    """Compare `copy` with `source`; returns counts. `progress(done, total)` counts the parts of the work.

    Raises Refused with every difference found (each a DifferenceError: file, parameter, first index, both values), or
    with SourceErrors where the source itself is refused; ResourceError where `max_memory` is too small; UsageError for
    names in `how` that mean nothing.
    """
    stop = stop or Stop()
    allowed = min(how.max_memory, memory.machine_limit())
    limit = MAX_MANIFEST_NBYTES if how.is_own else memory.parse_limit(allowed, memory.resident())
    problems, found = Problems(), Problems()
    original = open_side(source, limit, problems, how.allow)
    problems.raise_if_any()
    other = open_side(copy, limit, found, how.allow)
    _check_names(other, how)
    budget = _budget(original, other, how, allowed)
    found.extend(_structure_problems(original, other, how, budget))
    with stop.awaited():
        done = list(run(list(_tasks(original, other, how, budget, stop)), budget.num_workers, stop, progress))
    found.extend(task.difference for task in done if task.difference)
    for problem in found:
        if isinstance(problem, ResourceError):
            raise problem  # Nothing is known then, least of all a difference.
    Problems([DifferenceError(str(problem)) for problem in found]).raise_if_any()
    assert original.checkpoint and other.checkpoint, "what could not be opened has problems"
    num_elements = other.checkpoint.num_elements(_vocab_size(original.checkpoint, other.checkpoint))
    return {"equal": True, "num_files": len(other.checkpoint.files), "num_elements": num_elements,
            "num_elements_compared": sum(task.num_elements for task in done),
            "num_digests": sum(task.is_digest for task in done), "has_manifest": other.manifest is not None,
            "config_yaml_was_read": has_yaml(), "quick": how.quick, "sample": how.sample, "seed": how.seed}


def lines(facts: dict[str, Any]) -> Iterator[str]:
    """What `verify` found, for a person."""
    if facts["quick"]:
        yield f"verified structure of {facts['num_files']} files, no weight compared"
    elif facts["sample"] < 1:
        yield (f"verified {facts['num_files']} files, {facts['num_elements_compared']} of {facts['num_elements']} "
               f"weights (sample with seed {facts['seed']}): all equal")
    else:
        yield f"verified {facts['num_files']} files, {facts['num_elements']} weights: all equal"
    yield (f"digests  {facts['num_digests']} files as the manifest says" if facts["has_manifest"] else
           "digests  none: the folder has no manifest of this tool")
    if not facts["config_yaml_was_read"]:
        yield "note     config.yaml was not read, only its digest compared: PyYAML is not installed"


def _check_names(other: Side, how: How) -> None:
    """Raises UsageError for names that mean nothing: what they should have let through would be missed."""
    names = dict.fromkeys([*ALLOWABLE, *NEUTRAL, *WITHOUT_EFFECT, PADDING, STAGES])
    for name in how.allow:
        if name not in names:
            raise UsageError(f"--allow {quoted(name)}: the names are {', '.join(names)}")
    for path in how.edited:
        if not os.path.lexists(other.root / path):
            raise UsageError(f"--edited {quoted(path)}: there is no such file in {quoted(other.root)}")


def _budget(original: Side, other: Side, how: How, allowed: int) -> memory.MemoryPlan:
    source, copy = original.checkpoint, other.checkpoint
    casts = bool(source and copy and not how.quick and any(
        source.weights[name].dtype != copy.weights[name].dtype and (
            _cast_to(other, how) or copy.weights[name].parameter.is_float32) for name in shared(source, copy)))
    workers = memory.chosen_workers(how.num_workers, allowed)
    budget = memory.plan_memory(allowed, memory.resident(), workers, casts, num_buffers=2)
    if budget.projected > budget.allowed:
        raise ResourceError(f"--max-memory {memory.human(allowed)} cannot be kept: the comparison would reach "
                            f"{memory.human(budget.projected)} with {workers} workers"
                            f"{' and torch for casts' if casts else ''}; raise it, or lower --workers")
    return budget


def _structure_problems(original: Side, other: Side, how: How, budget: memory.MemoryPlan
                        ) -> Iterator[StreamReshardError]:
    """Everything in which the two differ without a look at the weights."""
    source, copy = original.checkpoint, other.checkpoint
    if copy is None:
        return
    yield from file_set_differences(other.root, other.manifest, [file.path for file in copy.files], how.ignored)
    if source is None:
        return
    yield from config_differences(source, copy, {*how.allow, *other.allowed})
    yield from id_differences(source, copy, how.allow)
    yield from parameter_differences(source, copy)
    if how.quick:
        rule = _rule(source, copy, other, how, budget)
        yield from filter(None, (shape_difference(name, source, copy, rule) for name in shared(source, copy)))
    if (topology := topology_of(copy.files)) is not None:
        problems, limit = Problems(), memory.yaml_limit(budget.allowed, budget.reserved)
        found = problems.collect(lambda: list(training_config_problems(other.root, copy, topology, limit)))
        yield from [*problems, *(found or ())]


def _tasks(original: Side, other: Side, how: How, budget: memory.MemoryPlan, stop: Stop) -> Iterator[Task]:
    source, copy = original.checkpoint, other.checkpoint
    told = dict(other.told(without=[os.path.normpath(path) for path in how.edited]))
    if how.sample < 1:
        for file in copy.files if copy else ():
            told.pop(file.path, None)
    if source is None or copy is None or how.quick:
        return digest_tasks(other.root, told, budget.block_nbytes, stop)
    rule = _rule(source, copy, other, how, budget)
    return weight_tasks(source, copy, rule, told, budget.block_nbytes, stop)


def _rule(source: Checkpoint, copy: Checkpoint, other: Side, how: How, budget: memory.MemoryPlan) -> Rule:
    return Rule(budget.block_nbytes // 4, _vocab_size(source, copy), _cast_to(other, how), how.sample, how.seed,
                PADDING not in how.allow)


def _cast_to(other: Side, how: How) -> str | None:
    """The safetensors dtype that the source is cast to; None where it is compared as it is."""
    names = {torch: name for name, torch in TORCH_DTYPES.items()}
    return names.get(how.dtype if how.dtype != "keep" else other.dtype)


def _vocab_size(source: Checkpoint, copy: Checkpoint) -> int:
    """Rows of the embedding without padding, as far as either folder says them."""
    return copy.vocab_size or source.vocab_size or min(copy.config.vocab_size, source.config.vocab_size)
