"""Verify: prove that two folders hold the same model, whatever their formats and topologies, in bounded memory.

- checkpoint:   a checkpoint as matrices that can be read by rows
- hugging_face: a Hugging Face folder as such
- nanotron:     a Nanotron folder as such, through the slice metadata in its own headers and Nanotron's own rules
- compare:      one parameter of both, element by element
- agreement:    configs, file sets, manifests

Nothing here uses the planner's slices or arithmetic, so that a wrong plan cannot agree with itself. What is shared is
the table of names (`architectures`), the reader of files, and Nanotron's balancing of stages.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from stream_reshard import engines, memory
from stream_reshard.errors import DifferenceError, Problems, ResourceError, SourceError, StreamReshardError, quoted
from stream_reshard.layouts.base import TORCH_DTYPES
from stream_reshard.layouts.hf_config import CONFIG_NAME
from stream_reshard.layouts.nanotron_config import MODEL_CONFIG_NAME
from stream_reshard.manifest import FileDone, Manifest, read_manifest
from stream_reshard.staging import files_below
from stream_reshard.stop import Stop
from stream_reshard.tensor_file import digest_of
from stream_reshard.verify.agreement import (
    config_differences, digest_problem, file_set_problems, parameter_differences, training_config_problems)
from stream_reshard.verify.checkpoint import Checkpoint
from stream_reshard.verify.compare import Compared, Rule, compare
from stream_reshard.verify.hugging_face import open_hugging_face
from stream_reshard.verify.nanotron import open_nanotron, topology_of


@dataclass(frozen=True)
class How:
    """What of two checkpoints is compared, and with what means."""

    max_memory: int = memory.DEFAULT_ALLOWED
    """Limit on the peak resident set of the process tree, in bytes."""
    num_workers: int = 2
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


@dataclass(frozen=True)
class _Side:
    """One of the two folders, opened."""

    root: Path
    manifest: Manifest | None
    checkpoint: Checkpoint | None

    def fact(self, name: str, default: Any) -> Any:
        """What its manifest says."""
        value = self.manifest.facts.get(name, default) if self.manifest else default
        return value if isinstance(value, type(default)) or default is None else default


def verify(source: Path, copy: Path, how: How = How(), stop: Stop | None = None,
           progress: Callable[[int, int], None] = lambda done, total: None) -> dict[str, Any]:
    """Compare `copy` with `source`; returns counts. `progress(done, total)` counts the parts of the work.

    Raises Refused with every difference found (each a DifferenceError: file, parameter, first index, both values), or
    with SourceErrors where the source itself is refused; ResourceError where `max_memory` is too small.
    """
    stop = stop or Stop()
    budget = _budget(how)
    with stop.awaited():
        problems = Problems()
        header_limit = memory.parse_limit(budget.allowed, budget.reserved)
        original = _opened(source, header_limit, problems)
        problems.raise_if_any()
        found = Problems()
        other = _opened(copy, header_limit, found)
        found.extend(_structure_problems(original, other, how))
        tasks = list(_tasks(original, other, how, budget, stop))
        done = list(_run(tasks, how.num_workers, stop, progress))
    found.extend(task.difference for task in done if task.difference)
    if found:
        Problems([DifferenceError(str(problem)) for problem in found]).raise_if_any()
    assert original.checkpoint and other.checkpoint, "what could not be opened has problems"
    num_elements = other.checkpoint.num_elements(_vocab_size(original.checkpoint, other.checkpoint))
    return {"equal": True, "num_files": len(other.checkpoint.files), "num_elements": num_elements,
            "num_elements_compared": sum(task.num_elements for task in done),
            "num_digests": sum(task.is_digest for task in done), "has_manifest": other.manifest is not None,
            "quick": how.quick, "sample": how.sample, "seed": how.seed}


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


def _budget(how: How) -> memory.MemoryPlan:
    allowed = min(how.max_memory, memory.machine_limit())
    budget = memory.plan_memory(allowed, memory.resident(), how.num_workers, how.dtype != "keep", needs_numpy=True)
    if budget.projected > budget.allowed:
        raise ResourceError(f"--max-memory {memory.human(allowed)} cannot be kept: the comparison would reach "
                            f"{memory.human(budget.projected)} with {how.num_workers} workers; raise it, or lower "
                            f"--workers")
    return budget


def _opened(root: Path, max_header_nbytes: int, problems: Problems) -> _Side:
    manifest = problems.collect(read_manifest, root) if root.is_dir() else None
    side = _Side(root, manifest, None)
    if not root.is_dir():
        problems.append(SourceError(f"{quoted(root)} is not a folder"))
    elif (root / CONFIG_NAME).is_file() and not (root / "model").is_dir():
        return _Side(root, manifest, open_hugging_face(root, max_header_nbytes, problems))
    elif (root / "model").is_dir() or (root / MODEL_CONFIG_NAME).is_file():
        vocab_size = side.fact("vocab_size", 0) or None
        return _Side(root, manifest, open_nanotron(root, vocab_size, max_header_nbytes, problems))
    else:
        problems.append(SourceError(f"{quoted(root)} holds neither {CONFIG_NAME} nor {MODEL_CONFIG_NAME}: it is not a "
                                    f"committed checkpoint"))
    return side


def _structure_problems(original: _Side, other: _Side, how: How) -> Iterator[StreamReshardError]:
    """Everything in which the two differ without a look at the weights."""
    source, copy = original.checkpoint, other.checkpoint
    if copy is None:
        return
    yield from file_set_problems(other.root, other.manifest, [file.path for file in copy.files])
    if source is None:
        return
    yield from config_differences(source, copy, {*how.allow, *other.fact("allowed", [])})
    yield from parameter_differences(source, copy)
    if (topology := topology_of(copy.files)) is not None:
        problems = Problems()
        found = problems.collect(lambda: list(training_config_problems(other.root, copy, topology)))
        yield from [*problems, *(found or ())]


def _tasks(original: _Side, other: _Side, how: How, budget: memory.MemoryPlan,
           stop: Stop) -> Iterator[Callable[[], Compared]]:
    """What there is to read, file by file: its digest, then the weights in it while they are still in memory."""
    source, copy, manifest = original.checkpoint, other.checkpoint, other.manifest
    found = set(files_below(other.root))  # A path in a manifest is a name to look up, never one to open.
    told = {path: file for path, file in (manifest.files if manifest else {}).items()
            if path in found and path not in how.edited and (other.root / path).is_file()}
    tensor_files = {file.path for file in copy.files} if copy else set()
    if how.sample < 1:
        told = {path: file for path, file in told.items() if path not in tensor_files}
    shared = [name for name in copy.weights if name in source.weights] if source and copy and not how.quick else []
    for name in shared:
        assert source and copy, "weights come from checkpoints"
        for path in dict.fromkeys(piece.tensor.file for piece in copy.weights[name].pieces):
            if path in told:
                yield partial(_digest, other.root, told.pop(path), budget.block_nbytes, stop)
        yield partial(compare, name, source, copy, _rule(source, copy, other, how, budget), stop)
    for file in told.values():
        yield partial(_digest, other.root, file, budget.block_nbytes, stop)


def _rule(source: Checkpoint, copy: Checkpoint, other: _Side, how: How, budget: memory.MemoryPlan) -> Rule:
    wanted = how.dtype if how.dtype != "keep" else other.fact("dtype", "keep")
    names = {torch: name for name, torch in TORCH_DTYPES.items()}
    return Rule(budget.block_nbytes // 4, _vocab_size(source, copy), names.get(wanted), how.sample, how.seed)


def _vocab_size(source: Checkpoint, copy: Checkpoint) -> int:
    """Rows of the embedding without padding, as far as either folder says them."""
    return copy.vocab_size or source.vocab_size or min(copy.config.vocab_size, source.config.vocab_size)


def _digest(root: Path, file: FileDone, buffer_nbytes: int, stop: Stop) -> Compared:
    nbytes = (root / file.path).stat().st_size
    digest = digest_of(root, file.path, memoryview(bytearray(min(buffer_nbytes, max(nbytes, 1)))), stop)
    problem = digest_problem(root, file, digest)
    return Compared(0, nbytes, DifferenceError(str(problem)) if problem else None, is_digest=True)


def _run(tasks: list[Callable[[], Compared]], num_workers: int, stop: Stop,
         progress: Callable[[int, int], None]) -> Iterator[Compared]:
    executor = ThreadPoolExecutor(num_workers) if num_workers > 1 else None
    num_done = 0
    try:
        for _, compared in engines.run_all(lambda task: task(), tasks, executor):
            num_done += 1
            progress(num_done, len(tasks))
            stop.check()
            yield compared
    except BaseException:
        stop.request()
        raise
    finally:
        if executor:
            executor.shutdown(cancel_futures=True)
