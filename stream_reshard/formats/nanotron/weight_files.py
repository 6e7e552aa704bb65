"""Description of a Nanotron weight file, from its name and the slice metadata of its header. Parsed strictly.

Names as `get_path` makes them (nanotron/serialize/utils.py), metadata as `TensorMetadata.to_str_dict` writes it
(nanotron/serialize/metadata.py), slices in the grammar of `SlicesPair` (nanotron/parallel/parameters.py).
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
"""The folders above every weight: that of the checkpoint's weights, and the attribute of the model class."""

_FOLDER = re.compile(r"[A-Za-z0-9_]+", re.ASCII)
_RANK = r"(0|[1-9]\d{0,5})"
_FILE_NAME = re.compile(r"model_([A-Za-z_][A-Za-z0-9_]*?)"
                        rf"(?:_pp-rank-{_RANK}-of-{_RANK}_tp-rank-{_RANK}-of-{_RANK})?\.safetensors", re.ASCII)
_NUMBER = r"(?:np\.int64\((\d{1,15})\)|(\d{1,15}))"
_SHAPE = re.compile(rf"\({_NUMBER}(?:, {_NUMBER})*,?\)", re.ASCII)
_SLICE = re.compile(r"(?:(\d{1,15}),(\d{1,15})|None,None),(?:None|1)", re.ASCII)
_FIELDS = {"version", "unsharded_shape", "local_global_slices_pairs"}
KNOWN_VERSIONS = ("1.2", "1.3", "1.4", "1.5")
"""Format versions whose files mean what is written here. Main reads none that is later (nanotron/serialize/weights.py),
files before 1.2 have no slices."""

_VERSION = re.compile(r"\d{1,3}\.\d{1,3}", re.ASCII)

MAX_PAIRS = 64
"""Far more than any parameter of Nanotron has; caps what a hostile header can make us do."""


@dataclass(frozen=True)
class Rank:
    """Coordinates of a sharded file on the parallel axes, as its name gives them."""

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
    """None where the file holds the whole parameter for every rank."""
    version: str | None
    """Format version in the header; None where the file is not sharded."""
    unsharded_shape: tuple[int, ...]
    pairs: tuple[tuple[Box, Box], ...]
    """(local, global): this box of the tensor is that box of the unsharded one."""
    identity: Identity | None = None
    """The file as it was before it was read."""

    @property
    def tensor(self) -> StoredTensor:
        """The one tensor in it."""
        return self.file.tensors[0]


def parse_path(path: str) -> tuple[str, Rank | None]:
    """(parameter, rank) of a path below the checkpoint's root. Raises SourceError for what Nanotron does not write."""
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
    """The file as its name and header tell it. Raises SourceError where they make no sense, or not with each other."""
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
            raise SourceError(f"Nanotron's strict reader wants the header fields {', '.join(sorted(_FIELDS))} and "
                              f"finds {quoted(sorted(metadata))}")
        if not _VERSION.fullmatch(metadata["version"]):
            raise SourceError(f"{quoted(metadata['version'])} is not a format version")
        if metadata["version"] not in KNOWN_VERSIONS:
            raise SourceError(f"the format version {quoted(metadata['version'])} is not known: what a file of it means "
                              f"may be anything; known are {', '.join(KNOWN_VERSIONS)}")
        unsharded = parse_shape(metadata["unsharded_shape"])
        pairs = parse_pairs(metadata["local_global_slices_pairs"], shape, unsharded)
        return WeightFile(file, parameter, rank, metadata["version"], unsharded, pairs)
    except SourceError as error:
        if str(error).startswith(quoted(file.path)):
            raise
        raise SourceError(f"{quoted(file.path)}: {error}") from error


def parse_shape(text: str) -> tuple[int, ...]:
    """`(128, 64)`, also as numpy 2 made Nanotron write it: `(np.int64(128), 64)`. Raises SourceError."""
    if len(text) > 40 * MAX_DIMS or not _SHAPE.fullmatch(text):
        raise SourceError(f"{quoted(text)} is not a shape")
    shape = tuple(int(a or b) for a, b in re.findall(_NUMBER, text))
    if len(shape) > MAX_DIMS or (len(shape) > 1 and text.endswith(",)")):
        raise SourceError(f"{quoted(text)} is not a shape")
    return shape


def parse_pairs(text: str, shape: tuple[int, ...], unsharded: tuple[int, ...]) -> tuple[tuple[Box, Box], ...]:
    """(local, global) boxes of `local_global_slices_pairs` for a tensor of `shape`.

    Raises SourceError for anything but plain slices of matching extents that take every element of the tensor once.
    """
    texts = text.split(";", MAX_PAIRS)
    if len(texts) > MAX_PAIRS:
        raise SourceError(f"more than {MAX_PAIRS} pairs of slices")
    pairs = []
    for pair in texts:
        sides = pair.split("#")
        if len(sides) != 2:
            raise SourceError(f"{quoted(pair)} is not a pair of slices")
        local, origin = _box(sides[0], shape), _box(sides[1], unsharded)
        if local.shape != origin.shape:
            raise SourceError(f"{quoted(pair)} pairs {local.shape} elements with {origin.shape}")
        pairs.append((local, origin))
    if fault := tiling_fault([local for local, _ in pairs], Box.whole(shape)):
        raise SourceError(f"its slices do not fit its tensor: {fault}")
    return tuple(pairs)


def _box(text: str, shape: tuple[int, ...]) -> Box:
    matches = [_SLICE.fullmatch(part) for part in text.split("|")]
    if len(matches) != len(shape) or not all(matches):
        raise SourceError(f"{quoted(text)} does not slice an array of shape {quoted(shape)}")
    bounds = [(int(m[1]), int(m[2])) if m and m[1] else (0, n) for m, n in zip(matches, shape)]
    if any(a > b or b > n for (a, b), n in zip(bounds, shape)):
        raise SourceError(f"{quoted(text)} reaches out of an array of shape {quoted(shape)}")
    return Box(tuple(a for a, _ in bounds), tuple(b for _, b in bounds))
