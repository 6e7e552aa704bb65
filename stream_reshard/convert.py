"""A conversion: from options to a plan that is proved and fits, and from there to a checkpoint."""
from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from stream_reshard import execute, memory
from stream_reshard.architectures import Family
from stream_reshard.casts import import_torch
from stream_reshard.documents import documents
from stream_reshard.errors import (
    DestinationError, Problems, ResourceError, SourceError, StreamReshardError, UsageError, quoted)
from stream_reshard.layouts.base import TORCH_DTYPES, Layout
from stream_reshard.layouts.hf_config import CONFIG_NAME, SourceConfig
from stream_reshard.layouts.hugging_face import INDEX_NAME, layout_of, model_of, open_config, open_files
from stream_reshard.layouts.nanotron import NanotronFormat, target_layout, topology_problems
from stream_reshard.layouts.nanotron_limits import limit_problems, not_honoured
from stream_reshard.plan import Job, Plan, make_plan
from stream_reshard.tensor_file import same_bytes
from stream_reshard.topology import Topology

COMPANIONS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
              "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json")
"""Files that are copied from the source where it has them."""

_SMALL_FILES_NBYTES = 2**20
"""What the documents, the manifest and folders may take beside the weights."""


@dataclass(frozen=True)
class Options:
    """Everything a user can choose about a conversion."""

    source: Path
    destination: Path | None
    """None where only a plan is asked for."""
    topology: Topology = Topology()
    config_class: str = "auto"
    """auto, LlamaConfig or Qwen2Config."""
    version: str = "1.5"
    rope: str = "auto"
    """auto, neox or interleaved."""
    vocab_multiple: int = 1
    dtype: str = "keep"
    """keep, bfloat16, float16 or float32."""
    allow: tuple[str, ...] = ()
    max_memory: int = memory.DEFAULT_ALLOWED
    """Limit on the peak resident set of the process tree, in bytes."""
    num_workers: int = 2
    restart: bool = False


@dataclass(frozen=True)
class Conversion:
    """A plan, with everything that running it needs."""

    options: Options
    config: SourceConfig
    format: NanotronFormat
    plan: Plan
    memory: memory.MemoryPlan
    notes: tuple[str, ...]
    """What the user should know and Nanotron will not honour."""
    copies: dict[str, Path] = field(default_factory=dict)
    """Files to copy, by name."""
    identities: dict[str, list[int]] = field(default_factory=dict)
    """The source files as the plan saw them."""

    @property
    def disk_nbytes(self) -> int:
        """Bytes the destination needs."""
        copied = sum(path.stat().st_size for path in self.copies.values())
        return self.plan.target.nbytes + copied + _SMALL_FILES_NBYTES

    @property
    def disk_free(self) -> int | None:
        """Bytes that the destination's disk has free, what an interrupted run left there included, as it is kept or
        thrown away; None where no destination is given."""
        if self.options.destination is None:
            return None
        destination = self.options.destination.resolve()
        status = os.statvfs(_existing_parent(destination))
        left = sum(path.stat().st_blocks * 512 for path in execute.staging_of(destination).rglob("*"))
        return status.f_bavail * status.f_frsize + left

    @property
    def dtype(self) -> str:
        """The dtype most weights have in the target, under torch's name."""
        counts: Counter[str] = Counter()
        for tensor in self.plan.target.tensors():
            counts[TORCH_DTYPES[tensor.dtype]] += tensor.nbytes
        return counts.most_common(1)[0][0]


def plan_conversion(options: Options) -> Conversion:
    """Read the source's headers and make the plan. Raises Refused with every problem found; writes nothing."""
    problems = Problems()
    config, format, source = _open(options, problems)
    dtypes = _dtypes(source, options.dtype)
    plan = make_plan(source, target_layout(options.destination or Path(), source.model, dtypes, format))
    casts = bool(plan.casts())
    if casts:
        problems.collect(import_torch)
    allowed = min(options.max_memory, memory.machine_limit())
    budget = memory.plan_memory(allowed, memory.resident(), options.num_workers, casts)
    copies = {name: options.source / name for name in COMPANIONS if (options.source / name).is_file()}
    names = [CONFIG_NAME, *(file.path for file in source.files)]
    names += [INDEX_NAME] if (options.source / INDEX_NAME).is_file() else []
    conversion = Conversion(options, config, format, plan, budget, tuple(_notes(config, format, source)), copies,
                            {name: execute.identity_of(options.source / name) for name in names})
    problems.extend(_resource_problems(conversion))
    problems.raise_if_any()
    return conversion


def _open(options: Options, problems: Problems) -> tuple[SourceConfig, NanotronFormat, Layout]:
    """The source and the format, or Refused with everything that is wrong with source, flags and destination."""
    config = problems.collect(open_config, options.source)
    files = problems.collect(open_files, options.source) if options.source.is_dir() else None
    if options.destination is not None:
        problems.extend(_destination_problems(options.source, options.destination))
    if config is None:
        problems.raise_if_any()
    format = problems.collect(_format_of, options, config.family) or NanotronFormat(options.topology)
    problems.extend(limit_problems(config, format, options.allow))
    source = None
    if files is not None and (model := problems.collect(model_of, config, files)):
        problems.extend(topology_problems(model, format))
        source = problems.collect(layout_of, options.source, model, files)
    if source is not None:
        problems.extend(_tie_problems(source))
    problems.raise_if_any()
    assert source is not None, "without a layout there is a problem"
    return config, format, source


def run_conversion(conversion: Conversion, progress: Callable[[Job], None] = lambda job: None) -> None:
    """Write the checkpoint; `progress` is called with every finished job."""
    options, config, plan = conversion.options, conversion.config, conversion.plan
    assert options.destination is not None, "a conversion needs a destination"
    has_tokenizer = any(name.startswith("tokenizer") for name in conversion.copies)
    texts = documents(config.model, conversion.format, config.family.has_attention_bias, conversion.dtype,
                      options.destination.resolve(), has_tokenizer)
    executor = ThreadPoolExecutor(options.num_workers) if options.num_workers > 1 else None
    try:
        execute.run(plan, options.destination.resolve(), texts, conversion.copies, conversion.identities,
                    conversion.memory.block_nbytes, executor, options.restart, progress)
    finally:
        if executor:
            executor.shutdown(cancel_futures=True)


def _format_of(options: Options, family: Family) -> NanotronFormat:
    name = family.nanotron_configs[0] if options.config_class == "auto" else options.config_class
    problems = Problems()
    if name not in family.nanotron_configs:
        problems.append(UsageError(f"--nanotron-config {name} cannot express {family.name} (it has no attention "
                                   f"biases); use {' or '.join(family.nanotron_configs)}"))
    if options.version == "1.2":
        if name != "LlamaConfig":
            problems.append(UsageError(f"--checkpoint-version 1.2: release 0.4 has no {name}; use 1.5"))
        if options.rope == "neox":
            problems.append(UsageError("--rope neox with --checkpoint-version 1.2: release 0.4 always interleaves "
                                       "RoPE; use interleaved or auto"))
    if options.vocab_multiple < 1:
        problems.append(UsageError(f"--vocab-multiple {options.vocab_multiple}: it is at least 1"))
    if options.num_workers < 1:
        problems.append(UsageError(f"--workers {options.num_workers}: it is at least 1"))
    problems.raise_if_any()
    interleaved = options.rope == "interleaved" or (options.rope == "auto" and options.version == "1.2")
    return NanotronFormat(options.topology, name, options.version, interleaved, options.vocab_multiple)


def _dtypes(source: Layout, wanted: str) -> dict[str, str]:
    """The target's dtype of each parameter. Raises SourceError where fused parameters would keep different ones."""
    if wanted != "keep":
        safetensors_name = {torch: name for name, torch in TORCH_DTYPES.items()}[wanted]
        return dict.fromkeys(source.slices, safetensors_name)
    by_name = {name: source.dtype_of(name) for name in source.slices}
    fused: dict[str, str] = {}
    for parameter in source.model.stored():
        first = fused.setdefault(parameter.nanotron, by_name[parameter.name])
        if first != by_name[parameter.name]:
            raise SourceError(f"{parameter.hugging_face} is {by_name[parameter.name]}, but Nanotron keeps it in one "
                              f"tensor with {first} weights; choose one with --dtype")
    return by_name


def _destination_problems(source: Path, destination: Path) -> Iterator[StreamReshardError]:
    real_source, real = source.resolve(), destination.resolve()
    if real == real_source or real in real_source.parents or real_source in real.parents:
        yield DestinationError(f"{quoted(destination)} and the source {quoted(source)} are the same folder or one is "
                               f"inside the other; choose another DST")
        return
    if destination.exists() and source.exists() and os.path.samefile(source, destination):
        yield DestinationError(f"{quoted(destination)} is the source under another name; choose another DST")
    staging = execute.staging_of(real)
    if staging.exists() and not staging.is_dir():
        yield DestinationError(f"{quoted(staging)} exists and is not a folder; the output grows there, remove it")
    if destination.exists() and not destination.is_dir():
        yield DestinationError(f"{quoted(destination)} exists and is not a folder")
    elif destination.exists() and any(destination.iterdir()):
        yield DestinationError(f"{quoted(destination)} is not empty; Nanotron would merge stale files without a word; "
                               f"choose another DST or empty it")
    parent = _existing_parent(real)
    if not parent.is_dir():
        yield DestinationError(f"{quoted(parent)} is not a folder")
    elif not os.access(parent, os.W_OK) or os.statvfs(parent).f_flag & os.ST_RDONLY:
        yield DestinationError(f"{quoted(parent)} cannot be written to")


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in path.parents if parent.exists())


def _tie_problems(source: Layout) -> Iterator[StreamReshardError]:
    """A tied model may store its head or not; where it does, it must be the embedding."""
    tensors = {tensor.key: tensor for tensor in source.tensors()}
    for parameter in source.model.parameters:
        if parameter.tied_to is not None and parameter.hugging_face in tensors:
            other = source.slices[parameter.tied_to][0].tensor
            if not same_bytes(source.root, tensors[parameter.hugging_face], other):
                yield SourceError(f"{parameter.hugging_face} differs from {other.key}, but config.json says "
                                  f"tie_word_embeddings; set it to false if the head is its own")


def _resource_problems(conversion: Conversion) -> Iterator[StreamReshardError]:
    budget = conversion.memory
    if budget.projected > budget.allowed:
        yield ResourceError(f"--max-memory {memory.human(budget.allowed)} cannot be kept: the run would reach "
                            f"{memory.human(budget.projected)} with {budget.num_workers} workers"
                            f"{' and torch for casts' if budget.casts else ''}; raise it, or lower --workers")
    if conversion.options.destination is None:
        return
    status = os.statvfs(_existing_parent(conversion.options.destination.resolve()))
    free = conversion.disk_free or 0
    if conversion.disk_nbytes > free:
        yield ResourceError(f"the destination needs {memory.human(conversion.disk_nbytes)}, its disk has "
                            f"{memory.human(free)} free")
    num_files = len(conversion.plan.target.files)
    if status.f_files and num_files > status.f_favail:
        yield ResourceError(f"the destination needs {num_files} files, its disk has room for {status.f_favail}")


def _notes(config: SourceConfig, format: NanotronFormat, source: Layout) -> Iterator[str]:
    yield from not_honoured(config, format)
    for key, reason in source.ignored.items():
        yield f"ignored tensor {key}: {reason}"
    stray = {path.name for path in source.root.glob("*.safetensors")} - {file.path for file in source.files}
    if stray:
        yield f"files that no index names, ignored: {', '.join(map(quoted, sorted(stray)))}"
