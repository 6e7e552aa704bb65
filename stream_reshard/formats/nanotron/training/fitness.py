"""Reasons why a training cannot go on at another topology, or not as before: batches, samples, metadata."""
from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

from stream_reshard.errors import Problems, SourceError, UsageError, quoted
from stream_reshard.formats.nanotron.config import METADATA_NAME
from stream_reshard.formats.nanotron.rules import listed
from stream_reshard.formats.nanotron.training.documents import LOADED, TrainingDocuments
from stream_reshard.formats.nanotron.yaml_text import CONFIG_YAML
from stream_reshard.model.topology import Topology

MAX_DP = 2**14
"""Largest number of replicas among the usable ones that a message lists."""

_OTHER_AXES = {"context_parallel_size": "several ranks save their states under one name",
               "expert_parallel_size": "Nanotron's trainer cannot start with it"}
"""Axes of parallelism that a checkpoint cannot be moved to or from, and why."""


BATCH = "global_batch"
"""Name in `--allow` for a step of another number of samples."""


def fitness_problems(documents: TrainingDocuments, topology: Topology, allowed: Collection[str] = ()) -> Problems:
    """Reasons why the training cannot go on at this topology. `allowed`: names that the user accepts."""
    problems = Problems(_axis_problems(documents.config["parallelism"]))
    most = min(MAX_DP, documents.num_micro_batches)
    usable = [dp for dp in range(1, most + 1) if not any(_faults(documents, replace(topology, dp=dp)))]
    cure = f"--dp can be {listed(usable)}" if usable else f"at --pp {topology.pp} no --dp can; choose a smaller one"
    if fault := _engine_fault(documents, topology):
        problems.append(UsageError(f"--dp {topology.dp}: {fault}; {cure}"))
    elif (fault := batch_fault(documents, topology)) and BATCH not in allowed:
        problems.append(UsageError(f"--dp {topology.dp}: {fault}; {cure}, or --allow {BATCH} accepts it"))
    return problems


def _faults(documents: TrainingDocuments, topology: Topology) -> tuple[str, str]:
    return _engine_fault(documents, topology), batch_fault(documents, topology)


def _axis_problems(parallelism: Mapping[str, Any]) -> Iterator[SourceError]:
    for axis, reason in _OTHER_AXES.items():
        if (size := parallelism.get(axis) or 1) != 1:
            yield SourceError(f"{CONFIG_YAML}: {axis} is {size}: {reason}, so this training cannot be moved")


def _engine_fault(documents: TrainingDocuments, topology: Topology) -> str:
    """The reason why the trainer would not run with so many replicas; "" if there is none."""
    num_each = documents.num_micro_batches // topology.dp
    if not num_each:
        return (f"a step has {documents.num_micro_batches} micro batches, which leaves some of {topology.dp} replicas "
                f"without one")
    if documents.config["parallelism"].get("pp_engine") == "1f1b" and num_each < topology.pp - 1:
        return (f"each replica has {num_each} micro batches in a step, and pp_engine 1f1b needs at least "
                f"{topology.pp - 1} for {topology.pp} stages")
    return ""


def batch_fault(documents: TrainingDocuments, topology: Topology) -> str:
    """The reason why replicas would not see the same samples as before; "" if there is none."""
    dp = topology.dp
    if documents.num_micro_batches % dp:
        return (f"a step takes {documents.batch_size} samples, {documents.micro_batch_size} at once "
                f"(micro_batch_size), and {dp} replicas cannot share them evenly")
    if documents.num_consumed % dp:
        return f"{documents.num_consumed} samples are consumed, which {dp} replicas cannot skip evenly"
    return ""


def fitness_notes(documents: TrainingDocuments, vocab_rows: int) -> Iterator[str]:
    """Remarks on documents that Nanotron will refuse, or that are changed beyond the topology. `vocab_rows`: rows of
    the embedding with padding."""
    yield from _sum_notes(documents.metadata["metas"])
    steps = documents.config["tokens"]["train_steps"]
    if steps <= documents.num_steps:
        yield (f"{CONFIG_YAML}: train_steps is {steps}, and {documents.num_steps} steps are done; Nanotron starts only "
               f"with a higher one")
    for key in LOADED:
        if documents.config["checkpoints"].get(key, True) is not True:
            yield f"{CONFIG_YAML}: {key} was {quoted(documents.config['checkpoints'][key])}, and is true now"
    for stage in _objects(documents.config.get("data_stages")):
        for dataset in _objects([_object(stage.get("data")).get("dataset")]):
            if (size := dataset.get("vocab_size", vocab_rows)) not in (None, vocab_rows):
                yield (f"{CONFIG_YAML}: the dataset of data stage {quoted(stage.get('name'))} has vocab_size "
                       f"{quoted(size)}, the model {vocab_rows} with padding; Nanotron refuses Nanosets where they "
                       f"differ")


def _sum_notes(metas: Mapping[str, Any]) -> Iterator[str]:
    """Remarks on sums that `TrainingMetadata.__post_init__` (nanotron/serialize/metadata.py) compares. A trainer with
    random data saves no tokens per dataset, and refuses what it saved."""
    if metas.get("data_stages") is None:
        return
    stages = _objects(metas["data_stages"])
    tokens = [_object(stage.get("consumed_tokens_per_dataset_folder")).values() for stage in stages]
    num_tokens = sum(number for numbers in tokens for number in numbers if isinstance(number, int))
    total = metas.get("consumed_tokens_total")
    if total is not None and total != num_tokens:
        yield (f"{METADATA_NAME}: consumed_tokens_total is {total}, its data stages name {num_tokens}; Nanotron will "
               f"not load it ('Mismatch between the total consumed tokens'): set consumed_tokens_total to null")
    num_samples = sum(stage["consumed_train_samples"] for stage in stages)
    if metas["consumed_train_samples"] != num_samples:
        yield (f"{METADATA_NAME}: consumed_train_samples is {metas['consumed_train_samples']}, its data stages name "
               f"{num_samples}; Nanotron will not load it ('Mismatch between the total consumed samples'): make them "
               f"agree")


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _objects(values: Any) -> list[Mapping[str, Any]]:
    return [value for value in values if isinstance(value, Mapping)] if isinstance(values, list) else []
