"""What two checkpoints must agree on beyond their weights, and what one must be by its own manifest."""
from __future__ import annotations

import importlib.util
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from stream_reshard.errors import DifferenceError, SourceError, quoted
from stream_reshard.layouts.base import TORCH_DTYPES
from stream_reshard.layouts.hf_limits import QUANTIZATION
from stream_reshard.layouts.nanotron_config import ids_written, parse_model_config
from stream_reshard.manifest import MANIFEST_NAME, FileDone, Manifest
from stream_reshard.model import TOKEN_IDS, ModelConfig
from stream_reshard.small_files import files_below, read_capped
from stream_reshard.topology import Topology, padded_size
from stream_reshard.verify.checkpoint import Checkpoint

_SETTLED_ELSEWHERE = {"vocab_size", "family", "unsaid_ids", *TOKEN_IDS}
"""Fields of ModelConfig that are compared through the weights (padding, and which parameters there are) or as token
ids."""

WITHOUT_EFFECT = (*TOKEN_IDS, "initializer_range")
"""Settings that change no forward pass, which may be allowed to differ."""

CONFIG_YAML = "config.yaml"


def config_differences(source: Checkpoint, copy: Checkpoint, allowed: Collection[str]) -> Iterator[DifferenceError]:
    """Settings in which two checkpoints of one model would compute different things."""
    for field in fields(ModelConfig):
        mine, theirs = getattr(copy.config, field.name), getattr(source.config, field.name)
        if mine != theirs and field.name not in {*_SETTLED_ELSEWHERE, *allowed}:
            yield DifferenceError(f"{field.name} is {quoted(mine)} in {quoted(copy.root)}, {quoted(theirs)} in the "
                                  f"source")
    for name in sorted(source.extras.keys() | copy.extras.keys()):
        own, other = copy.extras.get(name), source.extras.get(name)
        if name == QUANTIZATION and own is None:
            continue  # The source says it of weights that are not quantised, else they would not be here.
        if (own and own.value) != (other and other.value) and name not in allowed:
            yield DifferenceError(f"{name}: the source says: {other.text if other else 'nothing'}; {quoted(copy.root)} "
                                  f"says: {own.text if own else 'nothing'} (--allow {name} accepts it)")
    mine, theirs = copy.vocab_size, source.vocab_size
    if None not in (mine, theirs) and mine != theirs:
        yield DifferenceError(f"the vocabulary has {mine} rows in {quoted(copy.root)}, {theirs} in the source")


def parameter_differences(source: Checkpoint, copy: Checkpoint) -> Iterator[DifferenceError]:
    """Parameters that only one of the two has."""
    for name in source.weights.keys() ^ copy.weights.keys():
        only, other = (source, copy) if name in source.weights else (copy, source)
        yield DifferenceError(f"{only.weights[name].parameter.hugging_face} is in {quoted(only.root)}, but not in "
                              f"{quoted(other.root)}")


def file_set_differences(root: Path, manifest: Manifest | None, tensor_files: Collection[str],
                         ignored: Collection[str]) -> Iterator[DifferenceError]:
    """Files that are missing or extra, but for the ignored ones. Without a manifest only the tensor files can be
    judged, which their reader does for Nanotron; in a Hugging Face folder no shard may stand outside the index."""
    found = set(files_below(root)) - {MANIFEST_NAME, *ignored}
    if manifest is None:
        shards = {path for path in found if path.endswith(".safetensors") and "/" not in path}
        for path in sorted(shards - set(tensor_files)):
            yield DifferenceError(f"{quoted(path)} is extra: no index names it")
        return
    for path in sorted(manifest.files.keys()):
        if path not in found or not (root / path).is_file():
            what = "no file" if path in found else "missing"
            yield DifferenceError(f"{quoted(path)} is {what}: {MANIFEST_NAME} names it")
    for path in sorted(found - manifest.files.keys()):
        yield DifferenceError(f"{quoted(path)} is extra: {MANIFEST_NAME} does not name it")


def digest_difference(root: Path, file: FileDone, digest: str | None) -> DifferenceError | None:
    """A file that does not have the digest or size that the manifest says; `digest` is None where it says none."""
    nbytes = (root / file.path).stat().st_size
    if (nbytes, digest) == (file.nbytes, file.xxh3_128):
        return None
    hint = "; if you edited it, say so with --edited" if file.path == CONFIG_YAML else ""
    return DifferenceError(f"{quoted(file.path)} has {nbytes} bytes of digest {digest}, {MANIFEST_NAME} says "
                           f"{file.nbytes} of {file.xxh3_128}{hint}")


def training_config_problems(root: Path, checkpoint: Checkpoint, topology: Topology,
                             max_nbytes: int) -> Iterator[SourceError]:
    """Where the config.yaml that Nanotron trains from, if there is one, does not describe the weights beside it.

    Raises SourceError or Refused where it makes no sense at all.
    """
    text = _yaml(root, max_nbytes)
    if text is None:
        return
    told = parse_model_config(_below(text, "model", "model_config"), f"{CONFIG_YAML}: model_config")
    pairs = {field.name: (getattr(told.model, field.name), getattr(checkpoint.config, field.name))
             for field in fields(ModelConfig) if field.name not in _SETTLED_ELSEWHERE - {"family"}}
    pairs |= {key: (getattr(told.model, key), id) for key, id in ids_written(checkpoint.config).items()}
    said = told.rope_interleaved
    pairs["rope_interleaved"] = checkpoint.interleaved_by_default if said is None else said, checkpoint.interleaved
    dtypes = {TORCH_DTYPES.get(weight.dtype) for weight in checkpoint.weights.values()}
    if "dtype" in _below(text, "model") and len(dtypes) == 1:
        pairs["dtype"] = _below(text, "model")["dtype"], dtypes.pop()
    pairs |= {name: (told.extras.get(name), checkpoint.extras.get(name))
              for name in told.extras.keys() | checkpoint.extras.keys()}
    parallelism, multiple = _below(text, "parallelism"), _below(text, "model").get("make_vocab_size_divisible_by", 1)
    pairs |= {axis: (parallelism.get(axis), size) for axis, size in (("tp", topology.tp), ("pp", topology.pp))}
    if not (type(multiple) is int and multiple > 0):
        yield SourceError(f"{CONFIG_YAML}: make_vocab_size_divisible_by is {_told(multiple)}, not a positive int")
    else:
        pairs["vocab_size padded to make_vocab_size_divisible_by"] = (
            padded_size(told.model.vocab_size, topology.tp * multiple), checkpoint.config.vocab_size)
    for name, (mine, needed) in pairs.items():
        if mine != needed:
            yield SourceError(f"{CONFIG_YAML}: {name} is {_told(mine)}, the weights beside it need {_told(needed)}")


def _told(value: Any) -> str:
    """A scalar; of anything else its kind only, for aliases can make a short text an endless value."""
    return quoted(value) if isinstance(value, (str, int, float, type(None))) else f"a {type(value).__name__}"


def _yaml(root: Path, max_nbytes: int) -> Any:
    """config.yaml, parsed as data; None where it is absent or PyYAML is not installed."""
    if not has_yaml() or not os.path.lexists(root / CONFIG_YAML):
        return None
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses merge keys, which let a short text grow without end."""

        def flatten_mapping(self, node: Any) -> None:
            """Where other loaders would merge."""
            if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
                raise yaml.YAMLError("merge keys (<<) are not read here; write their values out")

    content = read_capped(root, CONFIG_YAML, max_nbytes)
    try:
        value = yaml.load(content, Loader) or {}
    except Exception as error:  # PyYAML's constructors raise whatever they stumble over.
        raise SourceError(f"{CONFIG_YAML} cannot be parsed: {quoted(error)}") from error
    if _size(value, 4 * len(content)) > 4 * len(content):
        raise SourceError(f"{CONFIG_YAML} is {len(content)} bytes long, but references make it endless")
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
    """Whether config.yaml can be read; without PyYAML only its digest is compared."""
    return importlib.util.find_spec("yaml") is not None


def _below(value: Any, *keys: str) -> Mapping[str, Any]:
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if isinstance(value, Mapping) else {}
