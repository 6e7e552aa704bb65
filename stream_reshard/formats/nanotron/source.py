"""A Nanotron checkpoint, opened for a conversion."""
from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from stream_reshard.destination.manifest import open_manifest
from stream_reshard.errors import Problems, SourceError, UsageError, quoted
from stream_reshard.formats.base import Described, Source
from stream_reshard.formats.layout import Group
from stream_reshard.formats.nanotron.config import (
    METADATA_NAME, MODEL_CONFIG_NAME, NanotronModelConfig, interleaves_by_default, read_model_config, with_known_ids)
from stream_reshard.formats.nanotron.folder import litter_notes, not_committed, weight_paths
from stream_reshard.formats.nanotron.layout import NanotronLayout
from stream_reshard.formats.nanotron.ranks import RankFile
from stream_reshard.formats.nanotron.rules import NanotronRules, stages_of, uneven_dims
from stream_reshard.formats.nanotron.weight_files import WeightFile, parse_pairs, parse_shape, read_weight_file
from stream_reshard.model.architectures import build_model
from stream_reshard.model.parameters import Model
from stream_reshard.model.topology import Topology
from stream_reshard.model.truncation import Truncate, left_out, recorded, untruncated
from stream_reshard.storage.dtypes import TORCH_DTYPES
from stream_reshard.storage.identity import identities_of


@dataclass(frozen=True, kw_only=True)
class NanotronSource(Source):
    """A Nanotron checkpoint that can be converted."""

    layout: NanotronLayout

    def with_rows(self, rows: int) -> NanotronSource:
        """The same with so many rows of the embedding; all others are padding."""
        if rows == self.config.vocab_size:
            return self
        config = replace(self.config, vocab_size=rows)
        model = build_model(self.family, config)
        layout = replace(self.layout, model=model, _ranks={}, _suffixes={})
        return replace(self, config=config, model=model, layout=layout)


_REPO, _COMMIT = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?", re.ASCII), re.compile(r"[0-9a-f]{40}")
"""A repository of the hub, and a commit in it, as a manifest may name them."""


def open_nanotron(root: Path, max_nbytes: int, vocab_size: int | None, problems: Problems, is_exact: bool = True,
                  truncate: Truncate = untruncated, keeps_rows: bool = False) -> Described | None:
    """Read config and headers, each of at most `max_nbytes`, of the layers that `truncate` takes. All problems are
    added to `problems`; with problems in the config, the result is None.

    `vocab_size`: rows of the embedding without padding, if the user gave them. Without `is_exact`, padding may be
    counted as vocabulary; with `keeps_rows` it is, unless the user gave a size: in a training it has states too.
    """
    if not os.path.isfile(root / MODEL_CONFIG_NAME):
        problems.append(not_committed(root))
        return None
    seen = identities_of(root, (MODEL_CONFIG_NAME, METADATA_NAME))
    whole = problems.collect(read_model_config, root, max_nbytes)
    facts = (problems.collect(_facts_of, root, max_nbytes) or {}) if is_exact else {}
    taken = problems.collect(truncate, recorded(whole.model, facts)) if whole else None
    absent = left_out(whole.model, taken) if whole and taken else range(0)
    files = problems.collect(read_weight_files, root, max_nbytes, absent)
    if whole is None:
        return None
    config = replace(whole, model=taken or whole.model)
    in_manifest = facts.get("vocab_size")
    if None not in (in_manifest, vocab_size) and in_manifest != vocab_size:
        problems.append(UsageError(f"--vocab-size {vocab_size}: the manifest of {quoted(root)} has {in_manifest}"))
    if vocab_size is None:
        vocab_size = in_manifest if is_exact and not keeps_rows else config.model.vocab_size
    size = problems.collect(_checked_vocab_size, config, vocab_size)
    layout = problems.collect(layout_of_files, root, config, size, files) if files and size else None
    known_ids = with_known_ids(config.model, config.family, facts.get("token_ids"))
    model_config = replace(known_ids or config.model, vocab_size=size or config.model.vocab_size)
    rules = rules_of(config, files) if files else None
    opened = {path: file.identity for path, file in (files.by_path if files else {}).items() if file.identity}
    described = Described(
        root=root, config_name=MODEL_CONFIG_NAME, family=config.family, config=model_config,
        model=layout.model if layout else None, unsupported=tuple(config.extras.values()),
        notes=(*litter_notes(root), *_notes(whole, layout.rules, files)) if layout and files else (),
        rope_interleaved=rules.rope_interleaved if rules else False, config_class=config.config_class,
        identities=seen | opened, router_dtype=facts.get("router_dtype"), origin=origin_in(facts),
        ids_are_known=known_ids is not None, recorded_vocab_size=in_manifest)
    return described if layout is None else NanotronSource(**vars(described), layout=layout)


def _facts_of(root: Path, max_nbytes: int) -> Mapping[str, Any]:
    """The facts in the manifest; empty without one. Raises SourceError."""
    manifest = open_manifest(root, max_nbytes)
    return manifest.facts if manifest else {}


def origin_in(facts: Mapping[str, Any]) -> Mapping[str, str] | None:
    """Repository and commit that a manifest names as the origin of the first conversion."""
    origin = facts.get("origin")
    if not isinstance(origin, dict) or not _REPO.fullmatch(str(origin.get("repo"))):
        return None
    return origin if _COMMIT.fullmatch(str(origin.get("commit"))) else None


def _checked_vocab_size(config: NanotronModelConfig, vocab_size: int | None) -> int:
    """Rows of the embedding without padding, which Nanotron does not keep. Raises UsageError where they are unknown."""
    rows = config.model.vocab_size
    if vocab_size is None:
        raise UsageError(f"--vocab-size is needed: the embedding has {rows} rows, Nanotron pads it and keeps no count "
                         f"of the true ones; give --vocab-size {rows} if none is padding")
    if not 0 < vocab_size <= rows:
        raise UsageError(f"--vocab-size {vocab_size}: the embedding has {rows} rows")
    return vocab_size


def _notes(config: NanotronModelConfig, rules: NanotronRules, files: WeightFiles) -> list[str]:
    """A remark on blocks that are on unusual stages. `config`: of the checkpoint, with all its layers."""
    own = stages_of(config.model, rules)
    moved = sorted(block for block, stage in files.stages.items() if own.get(block) != stage)
    return [f"{len(moved)} blocks such as {moved[0]} are on other stages than Nanotron's balancing gives them"
            ] if moved else []


MAX_PROBLEMS = 1000
"""Limit on the listed problems."""


@dataclass(frozen=True)
class WeightFiles:
    """The weight files of a checkpoint, with the topology and the version that all of them have."""

    by_path: Mapping[str, WeightFile]
    topology: Topology
    version: str

    @property
    def stages(self) -> dict[str, int]:
        """The stage of each pipeline block, by its Nanotron name. Blocks without sharded parameters are absent."""
        return {file.parameter.split(".pp_block")[0]: file.rank.pp for file in self.by_path.values() if file.rank}


def read_weight_files(root: Path, max_nbytes: int, left_out: range) -> WeightFiles:
    """Read the headers of all weight files but those of the layers that are left out, each of at most `max_nbytes`.
    Raises Refused."""
    problems = Problems()
    by_path = scan(root, max_nbytes, problems, left_out)
    problems.raise_if_any()
    return agreeing(root, by_path)


def scan(root: Path, max_nbytes: int, problems: Problems, left_out: range = range(0)) -> dict[str, WeightFile]:
    """The weight files by path, without the layers that are left out. Problems of unreadable files are added to
    `problems`."""
    by_path = {}
    for path in weight_paths(root, left_out):
        before = identities_of(root, [path])
        if file := problems.collect(read_weight_file, root, path, max_nbytes):
            by_path[file.file.path] = replace(file, identity=before.get(file.file.path))
        if len(problems) > MAX_PROBLEMS:
            break
    return by_path


def agreeing(root: Path, by_path: Mapping[str, WeightFile]) -> WeightFiles:
    """The files with their one topology and version. Raises Refused where there are several of either."""
    sizes = {(file.rank.num_tp, file.rank.num_pp) for file in by_path.values() if file.rank}
    versions = {file.version for file in by_path.values() if file.version}
    problems = Problems()
    for noun, values in (("topologies (TP, PP)", sizes), ("format versions", versions)):
        if len(values) > 1:
            problems.append(SourceError(f"{quoted(root)}: files of several {noun} stand together: "
                                        f"{', '.join(sorted(map(str, values)))}; Nanotron would silently merge them; "
                                        f"remove the stale ones"))
    if sizes and (num_ranks := max(map(max, sizes))) > len(by_path):  # Of few layers there may be few files.
        if num_ranks > (num_files := sum(1 for _ in weight_paths(root))):
            problems.append(SourceError(f"{quoted(root)}: names of files are for {num_ranks} ranks, but there are "
                                        f"{num_files} files in all"))
    if not sizes:
        problems.append(SourceError(f"{quoted(root)} holds no weight files of Nanotron in model/model"))
    problems.raise_if_any()
    tp, pp = sizes.pop()
    return WeightFiles(by_path, Topology(tp, pp), versions.pop())


def layout_of_files(root: Path, config: NanotronModelConfig, vocab_size: int, files: WeightFiles) -> NanotronLayout:
    """The layout of a checkpoint with `vocab_size` rows of the embedding without padding. Raises Refused."""
    if config.model.num_hidden_layers > len(files.by_path):
        raise SourceError(f"num_hidden_layers is {config.model.num_hidden_layers}, but there are {len(files.by_path)} "
                          f"weight files in all")
    rules = rules_of(config, files)
    model = build_model(config.family, replace(config.model, vocab_size=vocab_size))
    _check_sizes(model, rules, files)
    stages = stages_of(model.config, rules) | files.stages
    bare = NanotronLayout(root, model, rules, _Dtypes(model, files), stages=stages)
    problems = Problems()
    faults = _faults(bare, files)
    problems.extend(islice(faults, MAX_PROBLEMS))
    if problems:
        problems[-1].num_more = sum(1 for _ in faults)
    problems.raise_if_any()
    return replace(bare, begins=_Begins(bare, files))


def rules_of(config: NanotronModelConfig, files: WeightFiles) -> NanotronRules:
    """The rules of a Nanotron checkpoint, by its config and files."""
    interleaved = bool(config.rope_interleaved) or interleaves_by_default(config, {files.version})
    return NanotronRules(files.topology, config.config_class, files.version, interleaved,
                         vocab_rows=config.model.vocab_size)


def _check_sizes(model: Model, rules: NanotronRules, files: WeightFiles) -> None:
    """Raises SourceError where the config's sizes do not fit the files, before anything large is derived from them."""
    tp, experts, rows = rules.topology.tp, model.config.experts, rules.padded_vocab(model.config.vocab_size)
    for dim, size in [*([("vocab", rows)] if rows % tp else []), *uneven_dims(model, tp)]:
        raise SourceError(f"model_config.json: {size} {dim} cannot be split by the {tp} tensor-parallel ranks of the "
                          f"files")
    if experts is None:
        return
    stacked = [file for file in files.by_path.values() if file.parameter.endswith(".experts.merged_down_proj")]
    if not stacked:
        raise SourceError(f"num_experts in model_config.json is {experts.num_experts}, but no file holds experts")
    for file in stacked:
        if (num_experts := file.tensor.shape[0]) != experts.num_experts:
            raise SourceError(f"{quoted(file.file.path)} holds {num_experts} experts, but num_experts in "
                              f"model_config.json is {experts.num_experts}")


class _Dtypes:
    """The dtype of each parameter by its number: that of a file of its group; BF16 where all of them are missing."""

    def __init__(self, model: Model, files: WeightFiles):
        self._model = model
        self._by_name = {file.parameter: file.tensor.dtype for file in files.by_path.values()}

    def __call__(self, number: int) -> str:
        return self._by_name.get(self._model.parameter(number).nanotron, "BF16")


class _Begins:
    """Offset of the data in each file of a group, in bytes."""

    def __init__(self, layout: NanotronLayout, files: WeightFiles):
        self._layout = layout
        self._begins = {path: file.tensor.begin for path, file in files.by_path.items()}

    def __call__(self, group: Group) -> Sequence[int]:
        return [self._begins[path] for path in self._layout.paths_of(group)]


def _faults(layout: NanotronLayout, files: WeightFiles) -> Iterator[SourceError]:
    """Files that are missing, extra, or different from those that Nanotron would save."""
    expected: set[str] = set()
    for group in layout.groups():
        for path, rank in zip(layout.paths_of(group), layout.ranks_of(group)):
            expected.add(path)
            if (file := files.by_path.get(path)) is None:
                yield SourceError(f"{quoted(path)} is missing", kind="files are missing")
            elif fault := _fault(file, rank):
                yield SourceError(f"{quoted(path)} {fault}", kind="files are not what Nanotron makes of this model")
    for path in sorted(files.by_path.keys() - expected):
        yield SourceError(f"{quoted(path)} holds a parameter that the model does not have, or is on another stage than "
                          f"its block", kind="files are no part of the model")


def _fault(file: WeightFile, rank: RankFile) -> str | None:
    """Difference of a file from the one that Nanotron would save for its rank; None without one."""
    tensor, expected, metadata = file.tensor, rank.file.tensors[0], dict(rank.file.metadata)
    if tensor.shape != expected.shape:
        return f"has the shape {tensor.shape}, but model_config.json asks for {expected.shape}"
    if tensor.dtype != expected.dtype:
        return f"has the dtype {tensor.dtype}, others of its parameter have {expected.dtype}"
    if tensor.dtype not in TORCH_DTYPES:
        return f"has the dtype {tensor.dtype}, which no weight of Nanotron has"
    if not metadata:
        return None
    unsharded = parse_shape(metadata["unsharded_shape"])
    if file.unsharded_shape != unsharded:
        return f"is part of {file.unsharded_shape}, but model_config.json asks for {unsharded}"
    if file.pairs != parse_pairs(metadata["local_global_slices_pairs"], expected.shape, unsharded):
        return "is cut in another way than Nanotron cuts it for its rank"
    return None
