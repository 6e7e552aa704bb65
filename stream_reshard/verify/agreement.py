"""What two checkpoints must agree on beyond their weights, and what one must be by its own manifest."""
from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from stream_reshard.errors import DifferenceError, SourceError, quoted
from stream_reshard.manifest import MANIFEST_NAME, FileDone, Manifest
from stream_reshard.model import ModelConfig
from stream_reshard.staging import files_below
from stream_reshard.topology import Topology
from stream_reshard.verify.checkpoint import Checkpoint

_SETTLED_ELSEWHERE = {"vocab_size", "family"}
"""Fields of ModelConfig that are compared through the weights: padding, and which parameters there are."""

_MAY_BE_UNSAID = {"bos_token_id", "eos_token_id", "pad_token_id"}
"""Nanotron's configs must hold some token ids, Hugging Face's need not."""

CONFIG_YAML = "config.yaml"


def config_differences(source: Checkpoint, copy: Checkpoint, allowed: Collection[str]) -> Iterator[DifferenceError]:
    """Settings in which two checkpoints of one model would compute different things."""
    for field in fields(ModelConfig):
        mine, theirs = getattr(copy.config, field.name), getattr(source.config, field.name)
        unsaid = field.name in _MAY_BE_UNSAID and None in (mine, theirs)
        if mine != theirs and not unsaid and field.name not in {*_SETTLED_ELSEWHERE, *allowed}:
            yield DifferenceError(f"{field.name} is {quoted(mine)} in {quoted(copy.root)}, {quoted(theirs)} in the "
                                  f"source")
    for name in sorted(source.extras.keys() | copy.extras.keys()):
        mine, theirs = copy.extras.get(name), source.extras.get(name)
        if mine != theirs and name not in allowed:
            yield DifferenceError(f"{name}: the source says: {theirs or 'nothing'}; {quoted(copy.root)} says: "
                                  f"{mine or 'nothing'} (--allow {name} accepts it)")
    mine, theirs = copy.vocab_size, source.vocab_size
    if None not in (mine, theirs) and mine != theirs:
        yield DifferenceError(f"the vocabulary has {mine} rows in {quoted(copy.root)}, {theirs} in the source")


def parameter_differences(source: Checkpoint, copy: Checkpoint) -> Iterator[DifferenceError]:
    """Parameters that only one of the two has."""
    for name in source.weights.keys() ^ copy.weights.keys():
        only, other = (source, copy) if name in source.weights else (copy, source)
        yield DifferenceError(f"{only.weights[name].parameter.hugging_face} is in {quoted(only.root)}, but not in "
                              f"{quoted(other.root)}")


def file_set_problems(root: Path, manifest: Manifest | None, tensor_files: Collection[str]) -> Iterator[SourceError]:
    """Files that are missing or extra. Without a manifest only the tensor files can be judged, which their reader
    does for Nanotron; in a Hugging Face folder no shard may stand outside the index."""
    found = set(files_below(root)) - {MANIFEST_NAME}
    if manifest is None:
        shards = {path for path in found if path.endswith(".safetensors") and "/" not in path}
        for path in sorted(shards - set(tensor_files)):
            yield SourceError(f"{quoted(path)} is extra: no index names it")
        return
    for path in sorted(manifest.files.keys() - found):
        yield SourceError(f"{quoted(path)} is missing: {MANIFEST_NAME} names it")
    for path in sorted(found - manifest.files.keys()):
        yield SourceError(f"{quoted(path)} is extra: {MANIFEST_NAME} does not name it")


def digest_problem(root: Path, file: FileDone, digest: str) -> SourceError | None:
    """A file that does not have the digest or size that the manifest says."""
    nbytes = (root / file.path).stat().st_size
    if (nbytes, digest) == (file.nbytes, file.xxh3_128):
        return None
    hint = "; if you edited it, say so with --edited" if file.path == CONFIG_YAML else ""
    return SourceError(f"{quoted(file.path)} has {nbytes} bytes of digest {digest}, {MANIFEST_NAME} says {file.nbytes} "
                       f"of {file.xxh3_128}{hint}")


def training_config_problems(root: Path, checkpoint: Checkpoint, topology: Topology) -> Iterator[SourceError]:
    """Where the config.yaml that Nanotron trains from does not describe the weights beside it."""
    text = _yaml(root)
    if text is None:
        return
    model = _below(text, "model", "model_config")
    for field in fields(ModelConfig):
        if field.name in {*_SETTLED_ELSEWHERE, *_MAY_BE_UNSAID} or field.name not in model:
            continue
        if model[field.name] != getattr(checkpoint.config, field.name):
            yield SourceError(f"{CONFIG_YAML}: {field.name} is {quoted(model[field.name])}, model_config.json says "
                              f"{quoted(getattr(checkpoint.config, field.name))}")
    vocab = model.get("vocab_size")
    if vocab not in (checkpoint.config.vocab_size, checkpoint.vocab_size or vocab):
        yield SourceError(f"{CONFIG_YAML}: vocab_size is {quoted(vocab)}, the weights have "
                          f"{checkpoint.config.vocab_size} rows")
    for axis, size in (("tp", topology.tp), ("pp", topology.pp)):
        told = _below(text, "parallelism").get(axis)
        if told is not None and told != size:
            yield SourceError(f"{CONFIG_YAML}: {axis} is {quoted(told)}, the weight files are cut for {size}")


def _yaml(root: Path) -> Any:
    """config.yaml, parsed as data; None where it is absent or PyYAML is not installed (its digest speaks then)."""
    try:
        import yaml
    except ImportError:
        return None
    try:
        with open(root / CONFIG_YAML, "rb") as stream:
            return yaml.safe_load(stream.read(2**20))
    except FileNotFoundError:
        return None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise SourceError(f"{CONFIG_YAML} cannot be parsed: {quoted(error)}") from error


def _below(value: Any, *keys: str) -> Mapping[str, Any]:
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if isinstance(value, Mapping) else {}
