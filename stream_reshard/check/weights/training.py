"""Checks of the config.yaml beside the weights: it must describe them, and start a training from them."""
from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from stream_reshard.check.weights.checkpoint import Checkpoint
from stream_reshard.check.weights.files import CONFIG_YAML
from stream_reshard.check.weights.start import Folder, start_problems
from stream_reshard.errors import Problems, SourceError, quoted
from stream_reshard.formats.nanotron.config import NanotronModelConfig, ids_written, parse_model_config
from stream_reshard.formats.nanotron.rules import padded_size
from stream_reshard.model.parameters import TOKEN_IDS, ModelConfig
from stream_reshard.storage.dtypes import TORCH_DTYPES
from stream_reshard.storage.small_files import read_capped

_NOT_OF_THE_WEIGHTS = {"vocab_size", "unsaid_ids", *TOKEN_IDS}
"""Fields of ModelConfig that are not compared as they stand: the trainer pads the vocabulary, ids are Nanotron's."""


def training_problems(folder: Folder, checkpoint: Checkpoint, max_nbytes: int, notes: list[str]
                      ) -> tuple[Problems, Problems]:
    """(settings in which the config.yaml in a folder, if any, describes other weights; reasons why a training does not
    start from those beside it). Remarks that are no faults go to `notes`."""
    problems, elsewhere = Problems(), Problems()
    if not has_yaml() or not os.path.lexists(folder.root / CONFIG_YAML):
        return problems, elsewhere
    content = problems.collect(read_capped, folder.root, CONFIG_YAML, max_nbytes)
    text = problems.collect(_parsed, content) if content is not None else None
    if content is not None and text is not None:
        problems.extend(problems.collect(lambda: list(_model_problems(text, checkpoint, notes))) or ())
        elsewhere.extend(elsewhere.collect(lambda: list(start_problems(
            folder, content, _below(text, "model").get("init_method"), _below(text, "checkpoints"), notes))) or ())
    return problems, elsewhere


def _model_problems(text: Mapping[str, Any], checkpoint: Checkpoint, notes: list[str]) -> Iterator[SourceError]:
    """Settings in config.yaml that do not fit the weights. Raises SourceError or Refused where it makes no sense."""
    told = parse_model_config(_below(text, "model", "model_config"), f"{CONFIG_YAML}: model_config")
    multiple = _below(text, "model").get("make_vocab_size_divisible_by", 1)
    pairs = _pairs(text, told, checkpoint)
    if not (type(multiple) is int and multiple > 0):
        yield SourceError(f"{CONFIG_YAML}: make_vocab_size_divisible_by is {_told(multiple)}, not a positive int")
    else:
        assert checkpoint.topology, "it is one of Nanotron's"
        pairs["vocab_size padded to make_vocab_size_divisible_by"] = (
            padded_size(told.model.vocab_size, checkpoint.topology.tp * multiple), checkpoint.config.vocab_size)
    for name, (mine, needed) in pairs.items():
        if mine != needed:
            yield SourceError(f"{CONFIG_YAML}: {name} is {_told(mine)}, the weights beside it need {_told(needed)}")
    dp = _below(text, "parallelism").get("dp")
    if not (type(dp) is int and dp > 0):
        yield SourceError(f"{CONFIG_YAML}: dp is {_told(dp)}, not a positive int")
    length, most = _below(text, "tokens").get("sequence_length"), checkpoint.config.max_position_embeddings
    if isinstance(length, int) and length > most:
        notes.append(f"{CONFIG_YAML}: sequence_length {length} is more than the {most} positions that the model knows "
                     f"(max_position_embeddings); Nanotron trains it all the same (trainer.py, init_model)")


def _pairs(text: Mapping[str, Any], told: NanotronModelConfig, checkpoint: Checkpoint) -> dict[str, tuple[Any, Any]]:
    """(value in config.yaml, value that the weights need) by setting."""
    pairs = {field.name: (getattr(told.model, field.name), getattr(checkpoint.config, field.name))
             for field in fields(ModelConfig) if field.name not in _NOT_OF_THE_WEIGHTS}
    pairs |= {key: (getattr(told.model, key), id) for key, id in ids_written(checkpoint.config).items()}
    said = told.rope_interleaved
    pairs["rope_interleaved"] = checkpoint.interleaved_by_default if said is None else said, checkpoint.interleaved
    dtypes = {TORCH_DTYPES.get(checkpoint.weights.dtype_of(name)) for name in checkpoint.weights}
    if "dtype" in _below(text, "model") and len(dtypes) == 1:
        pairs["dtype"] = _below(text, "model")["dtype"], dtypes.pop()
    pairs |= {name: (told.extras.get(name), checkpoint.extras.get(name))
              for name in told.extras.keys() | checkpoint.extras.keys()}
    parallelism, topology = _below(text, "parallelism"), checkpoint.topology
    assert topology, "it is one of Nanotron's"
    pairs |= {axis: (parallelism.get(axis), size) for axis, size in (("tp", topology.tp), ("pp", topology.pp))}
    # Files of experts hold all of them, and with context parallelism the trainer starts from no path (trainer.py).
    return pairs | {axis: (parallelism.get(axis, 1), 1) for axis in ("expert_parallel_size", "context_parallel_size")}


def _told(value: Any) -> str:
    """A scalar as text; of anything else only its type, for aliases can make a short text an endless value."""
    return quoted(value) if isinstance(value, (str, int, float, type(None))) else f"a {type(value).__name__}"


def _parsed(content: bytes) -> Mapping[str, Any]:
    """config.yaml, parsed as data. Raises SourceError where it is none."""
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]  # It has no types.
        """Refuses merge keys, which let a short text grow without end."""

        def flatten_mapping(self, node: Any) -> None:
            """Raise YAMLError for a merge key, which other loaders would follow."""
            if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
                raise yaml.YAMLError("merge keys (<<) are not read here; write their values out")

    try:
        value = yaml.load(content, Loader)
    except Exception as error:  # PyYAML's constructors raise whatever they stumble over.
        raise SourceError(f"{CONFIG_YAML} cannot be parsed: {quoted(error)}") from error
    if value is not None and _size(value, 4 * len(content)) > 4 * len(content):
        raise SourceError(f"{CONFIG_YAML} is {len(content)} bytes long, but references make it endless")
    if not isinstance(value, Mapping):
        raise SourceError(f"{CONFIG_YAML} is empty: no training can start from it" if value is None else
                          f"{CONFIG_YAML} holds a {type(value).__name__}, not a mapping of settings")
    return value


def _size(value: Any, limit: int) -> int:
    """Characters and values in what was parsed, references followed, up to about `limit`: a few lines of references
    to references can stand for more than any memory holds."""
    total, waiting = 0, [value]
    while waiting and total <= limit:
        item = waiting.pop()
        total += 1 + len(item) if isinstance(item, (str, bytes, dict, list, tuple, set)) else 1
        if isinstance(item, (dict, list, tuple, set)):
            waiting += [*item.keys(), *item.values()] if isinstance(item, dict) else item
    return total


def has_yaml() -> bool:
    """True where config.yaml can be read; without PyYAML only its digest is compared."""
    return importlib.util.find_spec("yaml") is not None


def _below(value: Any, *keys: str) -> Mapping[str, Any]:
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if isinstance(value, Mapping) else {}
