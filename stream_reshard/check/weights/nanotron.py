"""A Nanotron checkpoint, read through the slice metadata in its own headers, and checked against Nanotron's own rules.

At the topology of the checkpoint, Nanotron copies each file without reading the slices in its header; at another one
it trusts the headers alone. So both must agree: every rank's file holds the part that Nanotron gives the rank
(`groups`), and is on the stage that `build_model` (nanotron/models/base.py) gives its block.
"""
from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Container, Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

from stream_reshard.check.weights.checkpoint import Checkpoint, Piece, Weight, Weights, matrix_of
from stream_reshard.check.weights.groups import HeldFile, group_faults
from stream_reshard.errors import Problems, ResourceError, SourceError, quoted
from stream_reshard.formats.nanotron.config import (
    METADATA_NAME, MODEL_CONFIG_NAME, NanotronModelConfig, interleaves_by_default, read_model_config)
from stream_reshard.formats.nanotron.folder import not_committed, weight_paths
from stream_reshard.formats.nanotron.rules import NanotronRules, stages_of
from stream_reshard.formats.nanotron.weight_files import WeightFile, read_weight_file
from stream_reshard.model.architectures import build_model
from stream_reshard.model.box import Box
from stream_reshard.model.parameters import Model, Parameter
from stream_reshard.model.topology import Topology
from stream_reshard.model.truncation import Truncate, left_out, untruncated
from stream_reshard.storage.small_files import read_json

PER_FILE = 10
"""Bytes of JSON whose parsing takes as much memory as the facts kept of one weight file and its parameters."""

PER_PARAMETER = 5
"""Bytes of JSON whose parsing takes as much memory as one parameter of a config."""

MAX_UNKNOWN = 1000
"""Limit on files outside the manifest whose headers are read: these may be named files under another name."""

MAX_LISTED = 10
"""Limit on listed faults of one kind; the rest are counted."""


def open_nanotron(root: Path, vocab_size: int | None, max_header_nbytes: int, problems: Problems,
                  may_be_moved: bool = False, known: Container[str] | None = None,
                  truncate: Truncate = untruncated) -> Checkpoint | None:
    """Read config and headers of the layers that `truncate` takes; every fault goes to `problems`. None if nothing can
    be compared. With `may_be_moved`, blocks may stand on other stages than in Nanotron's balancing. Of files outside
    `known`, at most MAX_UNKNOWN headers are read: each such file is a difference in any case."""
    if not (root / MODEL_CONFIG_NAME).is_file():
        problems.append(not_committed(root))
        return None
    whole = problems.collect(read_model_config, root, max_header_nbytes)
    config = replace(whole, model=truncate(whole.model)) if whole else None
    absent = left_out(whole.model, config.model) if whole and config else range(0)
    files = problems.collect(_read_files, root, max_header_nbytes, problems, known, absent)
    if whole is None or config is None or files is None:
        return None
    if config.model.num_hidden_layers > len(files):
        problems.append(SourceError(f"{MODEL_CONFIG_NAME}: num_hidden_layers is {config.model.num_hidden_layers}, but "
                                    f"there are {len(files)} weight files in all"))
        return None
    num_before, model = len(problems), build_model(config.family, config.model)
    if model.num_stored * PER_PARAMETER > max_header_nbytes:
        problems.append(ResourceError(f"{quoted(root)} has {model.num_stored} parameters, too many to be compared "
                                      f"within --max-memory; raise it"))
        return None
    moved = list(_wrong_stages(files, whole))
    problems.extend(problems.collect(lambda: list(_disagreements(root, files, max_header_nbytes))) or ())
    problems.extend(() if may_be_moved else moved)
    by_default = interleaves_by_default(config, {file.version for file in files})
    interleaved = bool(config.rope_interleaved) or by_default
    weights = _Weights(root, model, files, interleaved, problems)
    if len(problems) > num_before and not weights:
        return None
    is_old = all(file.version in (None, "1.2") for file in files)
    unsaid = ["rope_theta"] if is_old and not config.says_rope_theta else []
    topology = next((Topology(file.rank.num_tp, file.rank.num_pp) for file in files if file.rank), Topology())
    return Checkpoint(root, model, vocab_size, config.extras, tuple(file.path for file in files), weights, unsaid, None,
                      topology, interleaved, by_default, len(moved), config.config_class,
                      next((file.version for file in files if file.version), None), config.is_whole)


def _read_files(root: Path, max_nbytes: int, problems: Problems, known: Container[str] | None,
                absent: range) -> list[HeldFile]:
    """The weight files, without those of layers that are `absent`. Raises ResourceError for more files than the memory
    has room for."""
    files: list[HeldFile] = []
    common: dict[Any, Any] = {}
    num_wrong = num_unknown = 0
    for path in weight_paths(root, absent):
        if known is not None and path not in known:
            num_unknown += 1
            if num_unknown > MAX_UNKNOWN:
                continue
        try:
            files.append(_held(read_weight_file(root, path, max_nbytes), common))
        except SourceError as error:
            num_wrong += 1
            error.kind = error.kind or "files that are not Nanotron's"
            if num_wrong <= MAX_LISTED:
                problems.append(error)
        if len(files) * PER_FILE > max_nbytes:
            raise ResourceError(f"{quoted(root)} has {len(files)} weight files and more, too many to be compared "
                                f"within --max-memory; raise it")
    if num_wrong > MAX_LISTED:
        problems[-1].num_more += num_wrong - MAX_LISTED
    return files


def _held(file: WeightFile, common: dict[Any, Any]) -> HeldFile:
    def once(value: Any) -> Any:
        return common.setdefault(value, value)

    return HeldFile(file.file.path, file.tensor.begin, once(file.parameter), once(file.rank), once(file.version),
                    once(file.tensor.dtype), once(file.tensor.shape), once(file.unsharded_shape), once(file.pairs))


def _disagreements(root: Path, files: list[HeldFile], max_nbytes: int) -> Iterator[SourceError]:
    """Errors for values of the whole checkpoint in which its files or checkpoint_metadata.json disagree."""
    ranks = [file.rank for file in files if file.rank]
    found: dict[str, set[Any]] = {"version": {file.version for file in files if file.rank},
                                  "tp": {rank.num_tp for rank in ranks}, "pp": {rank.num_pp for rank in ranks}}
    for key, values in found.items():
        if len(values) > 1:
            yield SourceError(f"files with several values of {key} stand together: "
                              f"{', '.join(sorted(map(str, values)))}; Nanotron would silently merge them")
    metadata = read_json(root, METADATA_NAME, max_nbytes) if os.path.lexists(root / METADATA_NAME) else None
    for key in ("version", "tp"):
        if metadata is not None and len(found[key]) == 1 and metadata.get(key) not in list(found[key]):
            yield SourceError(f"{METADATA_NAME} has {key} {quoted(metadata.get(key))}, the weight files have "
                              f"{quoted(min(found[key]))}")


def _wrong_stages(files: list[HeldFile], config: NanotronModelConfig) -> Iterator[SourceError]:
    """Errors for files on another stage than in Nanotron's balancing, if all files agree on the number of stages."""
    sizes = {file.rank.num_pp for file in files if file.rank}
    stages = stages_of(config.model, NanotronRules(Topology(pp=sizes.pop()))) if len(sizes) == 1 else {}
    for file in files:
        stage = stages.get(file.parameter.split(".pp_block")[0])
        if file.rank and stage is not None and stage != file.rank.pp:
            yield SourceError(f"{quoted(file.path)} is on stage {file.rank.pp}, Nanotron's balancing looks for "
                              f"it on stage {stage}")


class _Weights(Weights):
    """The parameters of groups of files. Kept of each: its group, and the number of rows before it."""

    def __init__(self, root: Path, model: Model, files: list[HeldFile], interleaved: bool, problems: Problems):
        """Faults of the files go to `problems`; their parameters are left out."""
        self._model, self._interleaved = model, interleaved
        self._places: dict[str, tuple[list[HeldFile], int]] = {}
        by_name: dict[str, list[HeldFile]] = defaultdict(list)
        for file in files:
            by_name[file.parameter].append(file)
        for fused in _fused(model):
            found = by_name.pop(fused[0].nanotron, None)
            if found is None:
                problems.append(SourceError(f"{fused[0].nanotron} is missing in {quoted(root)}"))
                continue
            faults = list(group_faults(fused, found))
            problems.extend(SourceError(fault) for fault in faults)
            if not faults:
                self._places |= zip((parameter.name for parameter in fused), ((found, row) for row in _begins(fused)))
        problems.extend(SourceError(f"{quoted(by_name[name][0].path)} holds a parameter that the model does not have")
                        for name in sorted(by_name))

    def __getitem__(self, name: str) -> Weight:
        files, begin = self._places[name]
        parameter = self._model.parameter(self._model.number_of(name))
        if parameter.stacked is not None:
            return _stacked_weight(parameter, files[0], begin)
        return _weight(parameter, files, begin, self._interleaved and "half" in parameter.dims)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def dtype_of(self, name: str) -> str:
        return self._places[name][0][0].dtype

    def paths_of(self, name: str) -> list[str]:
        return [file.path for file in self._places[name][0]]


def _fused(model: Model) -> Iterator[list[Parameter]]:
    """The parameters fused in each Nanotron parameter, in the order of the forward pass; few are held at a time."""
    for _, parameters in groupby(model.stored(), lambda parameter: parameter.nanotron.split(".pp_block")[0]):
        of_block: dict[str, list[Parameter]] = defaultdict(list)
        for parameter in parameters:
            of_block[parameter.nanotron].append(parameter)
        yield from of_block.values()


def _begins(fused: list[Parameter]) -> Iterator[int]:
    """Number of rows before each fused parameter; for an expert, whose array is (expert, column, row), within its own
    matrix: gate's rows before up's."""
    begin = end = 0
    for parameter in fused:
        if not parameter.stacked:
            begin, end = end, end + matrix_of(parameter.matrix_shape)[0]
        yield begin


def _weight(parameter: Parameter, files: list[HeldFile], begin: int, interleaved: bool) -> Weight:
    """The matrix of a parameter: its rows of the unsharded array, in pieces from the files."""
    num_rows, num_columns = matrix_of(parameter.matrix_shape)
    window = Box((begin, 0), (begin + num_rows, num_columns))
    pieces = []
    for file in files:
        for local, origin in ((_flat(here), _flat(there)) for here, there in file.pairs):
            if common := origin.overlap(window):
                inside = common.seen_from(origin)
                corner = tuple(a + b for a, b in zip(local.start, inside.start))
                stop = tuple(a + n for a, n in zip(corner, common.shape))
                pieces.append(Piece(common.seen_from(window), file.tensor, Box(corner, stop)))
    return Weight(parameter, num_rows, tuple(pieces), interleaved)


def _stacked_weight(parameter: Parameter, file: HeldFile, begin: int) -> Weight:
    """The matrix of an expert, stored transposed."""
    num_rows, num_columns = parameter.matrix_shape
    top = (parameter.stacked or 0) * num_columns
    local = Box((top, begin), (top + num_columns, begin + num_rows))
    return Weight(parameter, num_rows, (Piece(Box.whole((num_rows, num_columns)), file.tensor, local, True),))


def _flat(box: Box) -> Box:
    return Box((*box.start, 0), (*box.stop, 1)) if len(box.start) == 1 else box
