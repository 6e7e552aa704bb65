"""A Nanotron weight file, described by its name and the slice metadata in its header. Parsed strictly.

Names are those of `get_path` (nanotron/serialize/utils.py), metadata that of `TensorMetadata.to_str_dict`
(nanotron/serialize/metadata.py), and slices have the grammar of `SlicesPair` (nanotron/parallel/parameters.py).
"""
from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from stream_reshard.errors import SourceError, quoted
from stream_reshard.model.box import Box, tiling_fault
from stream_reshard.storage.header import MAX_DIMS, StoredTensor, TensorFile, read_header
from stream_reshard.storage.identity import Identity

WEIGHTS_FOLDER = ("model", "model")
"""The folders above every weight file: the folder of weights, and the attribute `model` of Nanotron's model class."""

_FOLDER = re.compile(r"[A-Za-z0-9_]+", re.ASCII)
_RANK = r"(0|[1-9]\d{0,5})"
_FILE_NAME = re.compile(r"model_([A-Za-z_][A-Za-z0-9_]*?)"
                        rf"(?:_pp-rank-{_RANK}-of-{_RANK}_tp-rank-{_RANK}-of-{_RANK})?\.safetensors", re.ASCII)
_NUMBER = r"(?:np\.int64\((\d{1,15})\)|(\d{1,15}))"
_SHAPE = re.compile(rf"\({_NUMBER}(?:, {_NUMBER})*,?\)", re.ASCII)
_SLICE = re.compile(r"(?:(\d{1,15}),(\d{1,15})|None,None),(?:None|1)", re.ASCII)
_FIELDS = {"version", "unsharded_shape", "local_global_slices_pairs"}
KNOWN_VERSIONS = ("1.2", "1.3", "1.4", "1.5")
"""Format versions that this module can parse. Nanotron's main reads no later one (nanotron/serialize/weights.py); files
before 1.2 have no slices."""

_VERSION = re.compile(r"\d{1,3}\.\d{1,3}", re.ASCII)

MAX_PAIRS = 64
"""Limit on the pairs of slices in a header, far more than any parameter has: a hostile header cannot cost much work."""


@dataclass(frozen=True)
class Rank:
    """Coordinates of a sharded file on the parallel axes, from its name."""

    pp: int
    num_pp: int
    tp: int
    num_tp: int


@dataclass(frozen=True)
class WeightFile:
    """One file of one Nanotron parameter."""

    file: TensorFile
    parameter: str
    """Dotted name, below `model.`."""
    rank: Rank | None
    """Coordinates of the file; None where it holds the whole parameter for every rank."""
    version: str | None
    """Format version in the header; None where the file is not sharded."""
    unsharded_shape: tuple[int, ...]
    pairs: tuple[tuple[Box, Box], ...]
    """(box of the tensor, box of the unsharded tensor) with the same elements; Nanotron calls them local and global."""
    identity: Identity | None = None
    """Identity of the file before it was read."""

    @property
    def tensor(self) -> StoredTensor:
        """The one tensor in the file."""
        return self.file.tensors[0]


def parse_path(path: str) -> tuple[str, Rank | None]:
    """(parameter, rank) of a path below the checkpoint's root. Raises SourceError for a path that Nanotron does not
    write."""
    *folders, name = path.split("/")
    match = _FILE_NAME.fullmatch(name)
    if tuple(folders[:2]) != WEIGHTS_FOLDER or not folders[2:] or not all(map(_FOLDER.fullmatch, folders)) or not match:
        raise SourceError(f"{quoted(path)} is not a file that Nanotron writes")
    rank = Rank(*map(int, match.groups()[1:])) if match[2] else None
    if rank and not (rank.pp < rank.num_pp and rank.tp < rank.num_tp):
        raise SourceError(f"{quoted(path)} names a rank past the number of ranks")
    return ".".join([*folders[2:], match[1]]), rank


def read_weight_file(root: Path, path: str, max_nbytes: int) -> WeightFile:
    """Read the header of a weight file, of at most `max_nbytes`. Raises SourceError."""
    parse_path(path)
    return parse_weight_file(read_header(root, path, max_nbytes))


def parse_weight_file(file: TensorFile) -> WeightFile:
    """The file, by its name and header. Raises SourceError where one is invalid, or they contradict each other."""
    try:
        parameter, rank = parse_path(file.path)
        if [tensor.key for tensor in file.tensors] != ["data"]:
            raise SourceError("its header must name one tensor, data")
        shape, metadata = file.tensors[0].shape, dict(file.metadata)
        if rank is None:
            if metadata:
                raise SourceError("a file without ranks in its name must have no header fields")
            return WeightFile(file, parameter, None, None, shape, ((Box.whole(shape), Box.whole(shape)),))
        if set(metadata) != _FIELDS:
            raise SourceError(f"the header fields are {quoted(sorted(metadata))}; Nanotron's strict reader wants "
                              f"{', '.join(sorted(_FIELDS))}")
        if not _VERSION.fullmatch(metadata["version"]):
            raise SourceError(f"{quoted(metadata['version'])} is not a format version")
        if metadata["version"] not in KNOWN_VERSIONS:
            raise SourceError(f"the format version {quoted(metadata['version'])} is not known; known are "
                              f"{', '.join(KNOWN_VERSIONS)}")
        unsharded = parse_shape(metadata["unsharded_shape"])
        pairs = parse_pairs(metadata["local_global_slices_pairs"], shape, unsharded)
        return WeightFile(file, parameter, rank, metadata["version"], unsharded, pairs)
    except SourceError as error:
        if str(error).startswith(quoted(file.path)):
            raise
        raise SourceError(f"{quoted(file.path)}: {error}") from error


def parse_shape(text: str) -> tuple[int, ...]:
    """The shape in a text such as `(128, 64)`, or `(np.int64(128), 64)` as Nanotron writes it with numpy 2. Raises
    SourceError."""
    if len(text) > 40 * MAX_DIMS or not _SHAPE.fullmatch(text):
        raise SourceError(f"{quoted(text)} is not a shape")
    shape = tuple(int(a or b) for a, b in re.findall(_NUMBER, text))
    if len(shape) > MAX_DIMS or (len(shape) > 1 and text.endswith(",)")):
        raise SourceError(f"{quoted(text)} is not a shape")
    return shape


def parse_pairs(text: str, shape: tuple[int, ...], unsharded: tuple[int, ...]) -> tuple[tuple[Box, Box], ...]:
    """(local, global) boxes of the text of `local_global_slices_pairs`, for a tensor of `shape`.

    Raises SourceError unless the slices are plain, the two boxes of a pair have the same shape, and the local boxes
    cover every element of the tensor once.
    """
    texts = text.split(";", MAX_PAIRS)
    if len(texts) > MAX_PAIRS:
        raise SourceError(f"more than {MAX_PAIRS} pairs of slices")
    pairs = []
    for pair in texts:
        sides = pair.split("#")
        if len(sides) != 2:
            raise SourceError(f"{quoted(pair)} is not a pair of slices")
        local, unsharded_box = _box(sides[0], shape), _box(sides[1], unsharded)
        if local.shape != unsharded_box.shape:
            raise SourceError(f"{quoted(pair)} pairs {local.shape} elements with {unsharded_box.shape}")
        pairs.append((local, unsharded_box))
    if fault := tiling_fault([local for local, _ in pairs], Box.whole(shape)):
        raise SourceError(f"its slices do not fit its tensor: {fault}")
    return tuple(pairs)


def _box(text: str, shape: tuple[int, ...]) -> Box:
    matches = [_SLICE.fullmatch(part) for part in text.split("|")]
    if len(matches) != len(shape) or not all(matches):
        raise SourceError(f"{quoted(text)} does not slice an array of shape {quoted(shape)}")
    bounds = [(int(m[1]), int(m[2])) if m and m[1] else (0, n) for m, n in zip(matches, shape)]
    if any(start > stop or stop > n for (start, stop), n in zip(bounds, shape)):
        raise SourceError(f"{quoted(text)} reaches out of an array of shape {quoted(shape)}")
    return Box(tuple(start for start, _ in bounds), tuple(stop for _, stop in bounds))
