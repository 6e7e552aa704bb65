"""The documents of a training checkpoint: read, and changed for another topology.

All that does not depend on the topology stays as it is. The style of the texts is that of their writers in Nanotron:
`save_as_yaml` (config/config.py), `save_meta` (serialize/metadata.py), `save_checkpoint` (trainer.py), and
`save_optimizer` (serialize/optimizer.py).
"""
from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from stream_reshard.errors import Problems, SourceError, quoted
from stream_reshard.formats.config_reader import ConfigReader
from stream_reshard.formats.nanotron.config import METADATA_NAME, MODEL_CONFIG_NAME
from stream_reshard.formats.nanotron.documents import decoded_path
from stream_reshard.formats.nanotron.training.files import OPTIMIZER_CONFIG_NAME
from stream_reshard.formats.nanotron.training.zero import stretch_of
from stream_reshard.formats.nanotron.yaml_text import CONFIG_YAML, parse_settings, settings_text
from stream_reshard.model.topology import Topology
from stream_reshard.storage.small_files import MAX_JSON_NBYTES, read_capped, read_json

WITH_ZERO = "ZeroDistributedOptimizer"
WITH_MASTERS = "OptimizerFromGradientAccumulator"
PLAIN = "NamedOptimizer"
"""Nanotron's classes of optimizers: with ZeRO-1, with or without masters; without ZeRO, with masters; without both."""

LOADED = ("load_optimizer", "load_lr_scheduler")
"""Settings without which Nanotron leaves parts of a state behind."""


@dataclass(frozen=True)
class TrainingDocuments:
    """The documents of a training checkpoint, of which every value that is read has its type."""

    config: Mapping[str, Any]
    """config.yaml."""
    metadata: Mapping[str, Any]
    """checkpoint_metadata.json."""
    model_config: Mapping[str, Any]
    """model_config.json."""
    topology: Topology
    """That of the optimizer's files."""
    zero: int
    """Stage of ZeRO, 0 or 1."""

    @property
    def micro_batch_size(self) -> int:
        """Samples that pass through a replica at once."""
        return int(self.config["tokens"]["micro_batch_size"])

    @property
    def num_micro_batches(self) -> int:
        """Micro batches of a step, of all replicas together."""
        return int(self.config["tokens"]["batch_accumulation_per_replica"]) * self.topology.dp

    @property
    def batch_size(self) -> int:
        """Samples of a step."""
        return self.micro_batch_size * self.num_micro_batches

    @property
    def num_consumed(self) -> int:
        """Samples of the present data stage that are consumed: the next ones are dealt out from there."""
        metas = self.metadata["metas"]
        stages = metas.get("data_stages")
        return int((metas if stages is None else stages[metas["last_stage_idx"]])["consumed_train_samples"])

    @property
    def num_steps(self) -> int:
        """Steps that are done."""
        return int(self.metadata["metas"]["last_train_step"])

    @property
    def vocab_multiple(self) -> int:
        """The count that the rows of the embedding on each rank are a multiple of."""
        return self.config["model"].get("make_vocab_size_divisible_by") or 1

    def moved(self, topology: Topology, zero: int, vocab_rows: int, vocab_multiple: int, destination: Path
              ) -> dict[str, bytes]:
        """The documents at another topology, by name, for a training that goes on from `destination`. A step has as
        many samples as before. `vocab_rows`: rows of the embedding with padding, a multiple of TP times
        `vocab_multiple`."""
        path = decoded_path(str(destination))
        config: dict[tuple[str, ...], Any] = {
            **{("parallelism", axis): getattr(topology, axis) for axis in ("tp", "pp", "dp")},
            ("model", "model_config", "vocab_size"): vocab_rows,
            ("tokens", "batch_accumulation_per_replica"): self.num_micro_batches // topology.dp,
            ("optimizer", "zero_stage"): zero,
            ("checkpoints", "resume_checkpoint_path"): path,
            ("checkpoints", "checkpoints_path"): f"{path}-training"}
        if vocab_multiple != self.vocab_multiple:
            config["model", "make_vocab_size_divisible_by"] = vocab_multiple
        # Trees of 2024 know no such settings, and refuse unknown ones.
        config |= {("checkpoints", key): True for key in LOADED if key in self.config["checkpoints"]}
        metadata = changed(self.metadata, {("tp",): topology.tp, ("dp",): topology.dp})
        return {CONFIG_YAML: settings_text(changed(self.config, config)),
                METADATA_NAME: json.dumps(metadata, indent=2, sort_keys=True).encode(),
                MODEL_CONFIG_NAME: json.dumps(changed(self.model_config, {("vocab_size",): vocab_rows})).encode()}


def changed(document: Mapping[str, Any], changes: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """A copy of a document with other values at these paths of keys, in the old order."""
    copy = dict(document)
    for (key, *below), value in changes.items():
        copy[key] = changed(copy[key], {tuple(below): value}) if below else value
    return copy


def optimizer_config(topology: Topology, zero: int, has_masters: bool,
                     shapes: Iterable[tuple[str, tuple[int, ...]]]) -> bytes:
    """optimizer/optimizer_config.json. `shapes`: names of the parameters of the first stage in their order, and the
    shapes of a rank's shards. With ZeRO the file has their parts, those of other stages are missing: the first rank of
    all writes it."""
    configs: dict[str, Any] = {}
    if zero:
        named = dict(shapes)
        configs = {"param_name_to_dp_rank_offsets": {name: _offsets(math.prod(shape), topology.dp)
                                                     for name, shape in named.items()},
                   "orig_param_shapes": {name: list(map(str, shape)) for name, shape in named.items()}}
    return json.dumps({
        "type": WITH_ZERO if zero else WITH_MASTERS if has_masters else PLAIN,
        "parallelism": {"tp_size": str(topology.tp), "dp_size": str(topology.dp), "pp_size": str(topology.pp),
                        "expert_parallel_size": "1"},
        "configs": configs}).encode()


def _offsets(num_elements: int, num_ranks: int) -> dict[str, list[str]]:
    """[start, stop] of each rank's part of a flattened shard; a rank without elements is left out."""
    parts = {rank: stretch_of(num_elements, num_ranks, rank) for rank in range(num_ranks)}
    return {str(rank): [str(start), str(stop)] for rank, (start, stop) in parts.items() if start < stop}


def read_training_documents(root: Path, max_nbytes: int = MAX_JSON_NBYTES) -> TrainingDocuments:
    """Read the documents of a training checkpoint, each of at most `max_nbytes`. Raises Refused with all problems."""
    problems = Problems()
    config = problems.collect(lambda: parse_settings(read_capped(root, CONFIG_YAML, max_nbytes)))
    metadata, model_config, optimizer = (
        problems.collect(read_json, root, name, max_nbytes)
        for name in (METADATA_NAME, MODEL_CONFIG_NAME, OPTIMIZER_CONFIG_NAME))
    if config is not None:
        problems.collect(_check_config, config)
    if metadata is not None:
        problems.collect(_check_metadata, metadata)
    saved = problems.collect(_saved_at, optimizer) if optimizer is not None else None
    if not problems and config is not None and saved is not None:
        problems.collect(_check_agreement, config, *saved)
    topology, zero = problems.required(saved)
    return TrainingDocuments(problems.required(config), problems.required(metadata), problems.required(model_config),
                             topology, zero)


def _below(document: Mapping[str, Any], name: str, *keys: str) -> ConfigReader:
    """A reader of the settings below these keys. Raises SourceError where there are none."""
    for key in keys:
        name, value = f"{name}: {key}", document.get(key)
        if not isinstance(value, Mapping):
            raise SourceError(f"{name} is {quoted(value)}, not an object; it is not a document that Nanotron's trainer "
                              f"saved")
        document = value
    return ConfigReader(document, name)


class _Part(NamedTuple):
    """A part of config.yaml that is read or changed, and its numbers."""

    keys: tuple[str, ...]
    positive: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    """Positive where they are given."""
    counts: tuple[str, ...] = ()
    """Perhaps 0."""


_PARTS = (_Part(("parallelism",), ("tp", "pp", "dp"), ("context_parallel_size", "expert_parallel_size")),
          _Part(("model", "model_config"), ("vocab_size",)),
          _Part(("tokens",), ("micro_batch_size", "batch_accumulation_per_replica", "train_steps")),
          _Part(("optimizer",), counts=("zero_stage",)), _Part(("checkpoints",)))


def _check_config(config: Mapping[str, Any]) -> None:
    """Raises Refused where what is read or changed is absent, or is something else."""
    problems = Problems()
    for part in _PARTS:
        if reader := problems.collect(_below, config, CONFIG_YAML, *part.keys):
            for key in part.positive:
                reader.number(key, int)
            for key in part.optional:
                reader.number(key, int, 1)
            _counts(reader, *part.counts)
            problems.extend(reader.problems)
    problems.raise_if_any()


def _check_metadata(metadata: Mapping[str, Any]) -> None:
    """The same for checkpoint_metadata.json. Formats before 1.3 have no data stages."""
    reader = _below(metadata, METADATA_NAME, "metas")
    _counts(reader, "last_train_step", "consumed_train_samples")
    stages = reader.raw.get("data_stages")
    if stages is None:
        reader.problems.raise_if_any()
        return
    if reader.raw.get("consumed_tokens_total") is not None:
        _counts(reader, "consumed_tokens_total")
    last = reader.raw.get("last_stage_idx")
    if not isinstance(stages, list) or type(last) is not int or not 0 <= last < len(stages):
        reader.complain(f"last_stage_idx is {quoted(last)}, which is none of the data_stages {quoted(stages)}")
    for stage in stages if isinstance(stages, list) else ():
        below = _below({"data_stages": stage}, reader.name, "data_stages")
        _counts(below, "consumed_train_samples")
        reader.problems.extend(below.problems)
    reader.problems.raise_if_any()


def _counts(reader: ConfigReader, *keys: str) -> None:
    """Complain where a value is no number, which may be 0."""
    for key in keys:
        if type(value := reader.raw.get(key)) is not int or value:
            reader.number(key, int)


def _saved_at(optimizer: Mapping[str, Any]) -> tuple[Topology, int]:
    """(topology, stage of ZeRO) by optimizer_config.json, whose numbers are texts. Raises SourceError or Refused."""
    kind = optimizer.get("type")
    if kind not in (WITH_ZERO, WITH_MASTERS, PLAIN):
        raise SourceError(f"{OPTIMIZER_CONFIG_NAME}: type is {quoted(kind)}, not one of Nanotron's optimizers "
                          f"({WITH_ZERO}, {WITH_MASTERS}, {PLAIN})")
    reader = _below(optimizer, OPTIMIZER_CONFIG_NAME, "parallelism")
    texts = {key: reader.raw.get(key) for key in ("tp_size", "pp_size", "dp_size")}
    sizes = [reader.positive(key, int(text) if isinstance(text, str) and text.isdecimal() and len(text) < 9 else text,
                             int) for key, text in texts.items()]
    reader.problems.raise_if_any()
    return Topology(*sizes), int(kind == WITH_ZERO)


def _check_agreement(config: Mapping[str, Any], topology: Topology, zero: int) -> None:
    """Raises SourceError where config.yaml is of a training with another topology than the optimizer's files."""
    sizes = config["parallelism"]
    stated, stage = Topology(sizes["tp"], sizes["pp"], sizes["dp"]), config["optimizer"]["zero_stage"]
    if (stated, min(stage, 1)) != (topology, zero):  # Nanotron does for every stage above 0 what it does for 1.
        raise SourceError(f"{CONFIG_YAML} states {stated} and zero_stage {stage}, {OPTIMIZER_CONFIG_NAME} {topology} "
                          f"and zero_stage {zero}; restore the one that was not saved with this checkpoint")
