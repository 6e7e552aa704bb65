"""Checks of the config.yaml beside the weights: it must describe them, and a training must start from them."""
from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from stream_reshard.check.weights.checkpoint import Checkpoint
from stream_reshard.check.weights.start import TrainingFolder, start_problems, value_text
from stream_reshard.check.weights.states.settings import wanted_settings
from stream_reshard.check.weights.states.state import has_state
from stream_reshard.errors import Problems, SourceError
from stream_reshard.formats.nanotron.config import NanotronModelConfig, ids_written, parse_model_config
from stream_reshard.formats.nanotron.rules import padded_size
from stream_reshard.formats.nanotron.yaml_text import CONFIG_YAML, parse_settings
from stream_reshard.model.parameters import TOKEN_IDS, ModelConfig
from stream_reshard.model.topology import Topology
from stream_reshard.storage.dtypes import TORCH_DTYPES
from stream_reshard.storage.small_files import read_capped

_COMPARED_APART = {"vocab_size", "unsaid_ids", "whole_num_hidden_layers", *TOKEN_IDS}
"""Fields of ModelConfig that are compared in another form: padded, or as far as Nanotron holds token ids."""


def training_problems(folder: TrainingFolder, checkpoint: Checkpoint, topology: Topology, max_nbytes: int,
                      notes: list[str]) -> tuple[Problems, Problems]:
    """(errors for settings of the config.yaml in a folder, if any, that describe other weights; reasons why a training
    does not start from the weights beside it). Remarks go to `notes`."""
    problems, elsewhere = Problems(), Problems()
    if not os.path.lexists(folder.root / CONFIG_YAML):
        return problems, elsewhere
    content = problems.collect(read_capped, folder.root, CONFIG_YAML, max_nbytes)
    settings = problems.collect(parse_settings, content) if content is not None else None
    if content is not None and settings is not None:
        problems.extend(problems.collect(lambda: list(_model_problems(settings, checkpoint, topology, notes))) or ())
        elsewhere.extend(elsewhere.collect(lambda: list(start_problems(
            folder, content, _below(settings, "model").get("init_method"), _below(settings, "checkpoints"), notes,
            has_state(folder.root)))) or ())
    return problems, elsewhere


def _model_problems(settings: Mapping[str, Any], checkpoint: Checkpoint, topology: Topology,
                    notes: list[str]) -> Iterator[SourceError]:
    """Errors for settings in config.yaml that do not fit the weights. Raises SourceError or Refused for a model_config
    that is invalid."""
    config = parse_model_config(_below(settings, "model", "model_config"), f"{CONFIG_YAML}: model_config")
    multiple = _below(settings, "model").get("make_vocab_size_divisible_by", 1)
    pairs = _pairs(settings, config, checkpoint, topology)
    if checkpoint.state is not None:
        pairs |= {name: (value, needed) for name, value, needed in wanted_settings(settings, checkpoint.state)}
    if not (type(multiple) is int and multiple > 0):
        yield SourceError(f"{CONFIG_YAML}: make_vocab_size_divisible_by is {value_text(multiple)}, not a positive int")
    else:
        pairs["vocab_size padded to make_vocab_size_divisible_by"] = (
            padded_size(config.model.vocab_size, topology.tp * multiple), checkpoint.config.vocab_size)
    for name, (value, needed) in pairs.items():
        if value != needed:
            yield SourceError(f"{CONFIG_YAML}: {name} is {value_text(value)}, the weights beside it need "
                              f"{value_text(needed)}")
    dp = _below(settings, "parallelism").get("dp")
    if not (type(dp) is int and dp > 0):
        yield SourceError(f"{CONFIG_YAML}: dp is {value_text(dp)}, not a positive int")
    length, most = _below(settings, "tokens").get("sequence_length"), checkpoint.config.max_position_embeddings
    if isinstance(length, int) and length > most:
        notes.append(f"{CONFIG_YAML}: sequence_length {length} is more than the {most} positions of the model "
                     f"(max_position_embeddings); Nanotron does not refuse it (trainer.py, init_model)")


def _pairs(settings: Mapping[str, Any], config: NanotronModelConfig, checkpoint: Checkpoint,
           topology: Topology) -> dict[str, tuple[Any, Any]]:
    """(value in config.yaml, value that the weights need) by setting."""
    pairs = {field.name: (getattr(config.model, field.name), getattr(checkpoint.config, field.name))
             for field in fields(ModelConfig) if field.name not in _COMPARED_APART}
    pairs |= {key: (getattr(config.model, key), id) for key, id in ids_written(checkpoint.config).items()}
    is_interleaved = config.rope_interleaved
    pairs["rope_interleaved"] = (
        checkpoint.interleaved_by_default if is_interleaved is None else is_interleaved, checkpoint.interleaved)
    dtypes = {TORCH_DTYPES.get(checkpoint.weights.dtype_of(name)) for name in checkpoint.weights}
    if "dtype" in _below(settings, "model") and len(dtypes) == 1:
        pairs["dtype"] = _below(settings, "model")["dtype"], dtypes.pop()
    pairs |= {name: (config.extras.get(name), checkpoint.extras.get(name))
              for name in config.extras.keys() | checkpoint.extras.keys()}
    parallelism = _below(settings, "parallelism")
    pairs |= {axis: (parallelism.get(axis), size) for axis, size in (("tp", topology.tp), ("pp", topology.pp))}
    # A file of experts holds all of them, and with context parallelism the trainer starts from no path (trainer.py).
    return pairs | {axis: (parallelism.get(axis, 1), 1) for axis in ("expert_parallel_size", "context_parallel_size")}


def _below(value: Any, *keys: str) -> Mapping[str, Any]:
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if isinstance(value, Mapping) else {}
