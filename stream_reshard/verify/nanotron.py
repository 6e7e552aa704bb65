"""A Nanotron checkpoint, read through the slice metadata in its own headers, and held against Nanotron's own rules.

At the topology it was saved for, Nanotron copies each file without looking at its header; at another one it trusts the
headers alone. So both must say the same: every rank's file holds the part that `create_sharded_parameter`
(nanotron/parallel/sharded_parameters.py) gives that rank, and stands on the stage that `build_model`
(nanotron/models/base.py) gives its block.
"""
from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from stream_reshard.architectures import build_model
from stream_reshard.box import Box, tiling_fault
from stream_reshard.errors import Problems, SourceError, quoted
from stream_reshard.header import TensorFile
from stream_reshard.layouts.nanotron import NanotronFormat, stages_of
from stream_reshard.layouts.nanotron_config import (
    METADATA_NAME, MODEL_CONFIG_NAME, NanotronModelConfig, interleaves_by_default, read_model_config)
from stream_reshard.layouts.nanotron_files import WeightFile, parse_path, read_weight_file
from stream_reshard.layouts.nanotron_folder import not_committed, weight_paths
from stream_reshard.model import Parameter
from stream_reshard.small_files import read_json
from stream_reshard.topology import Topology
from stream_reshard.verify.checkpoint import PER_TENSOR, Checkpoint, Piece, Weight, matrix_of


def open_nanotron(root: Path, vocab_size: int | None, max_header_nbytes: int, problems: Problems,
                  may_be_moved: bool = False) -> Checkpoint | None:
    """Read config and headers; everything wrong goes to `problems`. None where nothing can be compared. With
    `may_be_moved`, blocks may stand on other stages than Nanotron's balancing gives them."""
    if not (root / MODEL_CONFIG_NAME).is_file():
        problems.append(not_committed(root))
        return None
    config = problems.collect(read_model_config, root, max_header_nbytes)
    files = [file for path in weight_paths(root)
             if (file := problems.collect(read_weight_file, root, path, max_header_nbytes))]
    if config is None:
        return None
    if fault := _size_fault(root, config, files, max_header_nbytes):
        problems.append(SourceError(fault))
        return None
    num_before = len(problems)
    by_name, groups = _grouped(files, config)
    problems.extend(SourceError(f"{name} is missing in {quoted(root)}")
                    for name in sorted(groups.keys() - by_name.keys()))
    problems.extend(SourceError(f"{quoted(by_name[name][0].file.path)} holds a parameter that the model does not have")
                    for name in sorted(by_name.keys() - groups.keys()))
    problems.extend(problems.collect(lambda: list(_disagreements(
        root, files, config, max_header_nbytes, may_be_moved))) or ())
    weights: dict[str, Weight] = {}
    by_default = interleaves_by_default(config, {file.version for file in files})
    interleaved = bool(config.rope_interleaved) or by_default
    for name in sorted(groups.keys() & by_name.keys()):
        faults = list(_Group(groups[name], by_name[name]).faults())
        problems.extend(SourceError(fault) for fault in faults)
        if not faults:
            weights |= {weight.parameter.name: weight
                        for weight in _weights(groups[name], by_name[name], interleaved)}
    if len(problems) > num_before and not weights:
        return None
    return Checkpoint(root, config.model, vocab_size, config.extras, interleaved, by_default,
                      tuple(file.file for file in files), weights)


def _size_fault(root: Path, config: NanotronModelConfig, files: list[WeightFile], max_nbytes: int) -> str | None:
    """Why nothing may be made of what a config says: there would be too much of it."""
    if config.model.num_hidden_layers > len(files):
        return (f"{MODEL_CONFIG_NAME}: num_hidden_layers is {config.model.num_hidden_layers}, but there are "
                f"{len(files)} weight files in all")
    if (number := build_model(config.family, config.model).num_stored) * PER_TENSOR > max_nbytes:
        return f"{quoted(root)} has {number} parameters, too many to be compared within --max-memory; raise it"
    return None


def _grouped(files: list[WeightFile],
             config: NanotronModelConfig) -> tuple[dict[str, list[WeightFile]], dict[str, list[Parameter]]]:
    """The files, and the model's parameters, by the name of the Nanotron parameter that they make up."""
    by_name: dict[str, list[WeightFile]] = defaultdict(list)
    for file in files:
        by_name[file.parameter].append(file)
    groups: dict[str, list[Parameter]] = defaultdict(list)
    for parameter in build_model(config.family, config.model).stored():
        groups[parameter.nanotron].append(parameter)
    return by_name, groups


def _disagreements(root: Path, files: list[WeightFile], config: NanotronModelConfig,
                   max_nbytes: int, may_be_moved: bool) -> Iterator[SourceError]:
    """What the files say of the whole checkpoint, against each other and checkpoint_metadata.json."""
    placed = [file for file in files if file.place]
    places = [file.place for file in files if file.place]
    told: dict[str, set[Any]] = {"version": {file.version for file in placed}, "tp": {place.num_tp for place in places},
                                 "pp": {place.num_pp for place in places}}
    for what, values in told.items():
        if len(values) > 1:
            yield SourceError(f"files with several values of {what} stand together: "
                              f"{', '.join(sorted(map(str, values)))}; Nanotron would merge them without a word")
    metadata = read_json(root, METADATA_NAME, max_nbytes) if os.path.lexists(root / METADATA_NAME) else None
    for what in ("version", "tp"):
        if metadata is not None and len(told[what]) == 1 and metadata.get(what) not in list(told[what]):
            yield SourceError(f"{METADATA_NAME} says {what} {quoted(metadata.get(what))}, the weight files say "
                              f"{quoted(min(told[what]))}")
    if len(told["pp"]) == 1 and not may_be_moved:
        yield from _wrong_stages(placed, config, min(told["pp"]))


def _wrong_stages(files: list[WeightFile], config: NanotronModelConfig, num_pp: int) -> Iterator[SourceError]:
    stages = stages_of(config.model, NanotronFormat(Topology(pp=num_pp)))
    for file in files:
        stage = stages.get(file.parameter.split(".pp_block")[0])
        if file.place and stage is not None and stage != file.place.pp:
            yield SourceError(f"{quoted(file.file.path)} is on stage {file.place.pp}, Nanotron's balancing looks for "
                              f"it on stage {stage}")


def topology_of(files: Sequence[TensorFile]) -> Topology | None:
    """The topology that the names of these files tell; None where they are not Nanotron's."""
    for file in files:
        if file.path.startswith("model/") and (place := parse_path(file.path)[1]):
            return Topology(place.num_tp, place.num_pp)
    return None


class _Group:
    """The files of one Nanotron parameter, and the parameters fused in it."""

    def __init__(self, fused: list[Parameter], files: list[WeightFile]):
        self.fused, self.files = fused, files
        self.first = files[0].file.path
        self.rows = [matrix_of(parameter.matrix_shape)[0] for parameter in fused]

    def faults(self) -> Iterator[str]:
        """Everything that keeps Nanotron from loading what the headers say."""
        split = self.fused[0].split
        if any((file.place is None) != (split is None) for file in self.files):
            yield f"{quoted(self.first)}: {'has no' if split else 'has'} ranks in its name, unlike Nanotron's own file"
        elif len({(file.unsharded_shape, file.tensor.dtype) for file in self.files}) > 1:
            yield f"{quoted(self.first)} and its other ranks disagree on unsharded_shape or dtype"
        elif fault := self._shape_fault() or self._rank_fault():
            yield fault
        else:
            for file in self.files:
                yield from self._slice_faults(file)

    def _shape_fault(self) -> str | None:
        found, own = self.files[0].unsharded_shape, self._own_shape()
        if found != own:
            return f"{quoted(self.first)}: unsharded shape {found}, but {MODEL_CONFIG_NAME} asks for {own}"
        return None

    def _own_shape(self) -> tuple[int, ...]:
        """What the config makes of it: matrices one below the other; those of experts stacked, transposed, side by
        side."""
        stacked = [parameter.stacked for parameter in self.fused if parameter.stacked is not None]
        if stacked:
            return 1 + max(stacked), self.fused[0].matrix_shape[1], sum(self.rows) // (1 + max(stacked))
        return sum(self.rows), *self.fused[0].matrix_shape[1:]

    def _rank_fault(self) -> str | None:
        if self.fused[0].split is None:
            return None
        ranks = sorted(file.place.tp for file in self.files if file.place)
        size = max(file.place.num_tp for file in self.files if file.place)
        if ranks != list(range(size)):
            return f"{quoted(self.first)}: of {size} tensor-parallel ranks there are {ranks}"
        origins = [origin for file in self.files for _, origin in file.pairs]
        if fault := tiling_fault(origins, Box.whole(self.files[0].unsharded_shape)):
            return f"{quoted(self.first)} and its other ranks do not make up the parameter: {fault}"
        return None

    def _slice_faults(self, file: WeightFile) -> Iterator[str]:
        """The part that Nanotron gives a rank: of each fused parameter its tp-th part, one below the other."""
        if file.place is None:
            return
        dim = self._split_dim()
        chunks = self.rows if dim == 0 else [file.unsharded_shape[1]]
        expected, local, begin = [], 0, 0
        for chunk in chunks:
            part = chunk // file.place.num_tp
            origin = begin + file.place.tp * part
            expected.append((local, origin, part))
            local, begin = local + part, begin + chunk
        found = [(here.start[dim], there.start[dim], here.shape[dim]) for here, there in file.pairs]
        is_whole = all(there.shape[k] == n for _, there in file.pairs
                       for k, n in enumerate(file.unsharded_shape) if k != dim)
        if found != expected or not is_whole:
            yield (f"{quoted(file.file.path)}: its header takes (local, global, extent) {found} of dim {dim}, but "
                   f"Nanotron gives tensor-parallel rank {file.place.tp} of {file.place.num_tp} {expected}")

    def _split_dim(self) -> int:
        """The dim of the stored array that tensor parallelism splits."""
        parameter = self.fused[0]
        split = parameter.dims.index(parameter.split or "")
        return next(dim for dim, group in enumerate(parameter.matrix) if split in group)


def _weights(fused: list[Parameter], files: list[WeightFile], interleaved: bool) -> Iterator[Weight]:
    """The matrix of each fused parameter: its rows of the unsharded array, in pieces from the files."""
    if fused[0].stacked is not None:
        yield from _stacked_weights(fused, files[0])
        return
    begin = 0
    for parameter in fused:
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
        yield Weight(parameter, num_rows, tuple(pieces), interleaved and "half" in parameter.dims)
        begin += num_rows


def _stacked_weights(fused: list[Parameter], file: WeightFile) -> Iterator[Weight]:
    """The matrices of experts, whose array is (expert, column, row): gate's rows before up's."""
    begin = end = 0
    for parameter in fused:
        num_rows, num_columns = parameter.matrix_shape
        if not parameter.stacked:
            begin, end = end, end + num_rows
        top = (parameter.stacked or 0) * num_columns
        local = Box((top, begin), (top + num_columns, end))
        yield Weight(parameter, num_rows, (Piece(Box.whole((num_rows, num_columns)), file.tensor, local, True),))


def _flat(box: Box) -> Box:
    return Box((*box.start, 0), (*box.stop, 1)) if len(box.start) == 1 else box
