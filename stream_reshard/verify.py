"""Verify: compare every weight of a Nanotron checkpoint with its Hugging Face source, byte for byte.

It reads the checkpoint as Nanotron's loader does, through `local_global_slices_pairs` in the files' own headers, and
takes nothing from the planner: a wrong plan cannot agree with itself here. Rows are compared in bounded bands.
"""
from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from stream_reshard.box import Box, tiling_fault
from stream_reshard.casts import cast
from stream_reshard.errors import DifferenceError, Problems, quoted
from stream_reshard.execute import MANIFEST_NAME, MARKER_NAME
from stream_reshard.header import ITEMSIZE, StoredTensor, TensorFile, read_header
from stream_reshard.layouts.hf_config import read_json
from stream_reshard.layouts.hugging_face import open_source
from stream_reshard.model import Parameter
from stream_reshard.tensor_file import SourceFile

BAND_NBYTES = 2**20

_FILE_NAME = re.compile(r"model_(\w+?)(?:_pp-rank-\d+-of-\d+_tp-rank-\d+-of-\d+)?\.safetensors")
_SLICE = re.compile(r"(?:(\d+),(\d+)|None,None),(?:None|1)")


@dataclass(frozen=True)
class Held:
    """What one pair of a header says: this box of the file's tensor is that box of the unsharded one."""

    tensor: StoredTensor
    local: Box
    origin: Box


def parse_pairs(text: str, local_shape: tuple[int, ...], shape: tuple[int, ...]) -> Iterator[tuple[Box, Box]]:
    """(local, global) boxes of `local_global_slices_pairs` (`SlicesPair`, nanotron/parallel/parameters.py).

    Raises DifferenceError for anything but plain slices.
    """
    for pair in text.split(";"):
        sides = pair.split("#")
        if len(sides) != 2:
            raise DifferenceError(f"{quoted(pair)} is not a pair of slices")
        yield _box(sides[0], local_shape), _box(sides[1], shape)


def _box(text: str, shape: tuple[int, ...]) -> Box:
    matches = [_SLICE.fullmatch(part) for part in text.split("|")]
    if len(matches) != len(shape) or not all(matches):
        raise DifferenceError(f"{quoted(text)} does not slice an array of shape {shape}")
    bounds = [(int(m[1]), int(m[2])) if m and m[1] else (0, n) for m, n in zip(matches, shape)]
    if any(a > b or b > n for (a, b), n in zip(bounds, shape)):
        raise DifferenceError(f"{quoted(text)} reaches out of an array of shape {shape}")
    return Box(tuple(a for a, _ in bounds), tuple(b for _, b in bounds))


def verify(source: Path, destination: Path) -> dict[str, Any]:
    """Compare; returns counts. Raises Refused with every difference found, SourceError where the source is refused."""
    _, layout = open_source(source)
    if not (destination / MARKER_NAME).is_file():
        raise DifferenceError(f"{quoted(destination)} holds no {MARKER_NAME}: it is not a committed checkpoint")
    unreadable, problems = Problems(), Problems()
    files = [unreadable.collect(read_header, destination, path.relative_to(destination).as_posix())
             for path in sorted((destination / "model").rglob("*")) if path.is_file()]
    problems.extend(DifferenceError(str(problem)) for problem in unreadable)
    present = [file for file in files if file is not None]
    _check_manifest(destination, present, problems)
    by_name = _by_nanotron_name(present, problems)
    groups: dict[str, list[Parameter]] = defaultdict(list)
    for parameter in layout.model.stored():
        groups[parameter.nanotron].append(parameter)
    for name in sorted(groups.keys() - by_name.keys()):
        problems.append(DifferenceError(f"{name} is missing in {quoted(destination)}"))
    for name in sorted(by_name.keys() - groups.keys()):
        problems.append(DifferenceError(f"{by_name[name][0].path} holds {name}, which the model does not have"))
    interleaved = _is_interleaved(destination, present)
    tensors = {tensor.key: tensor for tensor in layout.tensors()}
    for name in sorted(groups.keys() & by_name.keys()):
        problems.collect(_Comparison(source, tensors, destination, groups[name], by_name[name], interleaved).run)
    problems.raise_if_any()
    return {"num_files": len(present), "num_elements": layout.model.num_elements, "equal": True}


def _is_interleaved(destination: Path, files: list[TensorFile]) -> bool:
    """The order of q and k rows: as model_config.json says, and always interleaved for release 0.4."""
    versions = {dict(file.metadata).get("version") for file in files} - {None}
    return versions == {"1.2"} or bool(read_json(destination, MARKER_NAME).get("rope_interleaved"))


def _by_nanotron_name(files: list[TensorFile], problems: Problems) -> dict[str, list[TensorFile]]:
    names: dict[str, list[TensorFile]] = defaultdict(list)
    for file in files:
        *folders, last = file.path.split("/")
        match = _FILE_NAME.fullmatch(last)
        if folders[:2] != ["model", "model"] or not match or [tensor.key for tensor in file.tensors] != ["data"]:
            problems.append(DifferenceError(f"{quoted(file.path)} is not a file that Nanotron writes"))
        else:
            names[".".join([*folders[2:], match[1]])].append(file)
    return names


def _check_manifest(destination: Path, files: list[TensorFile], problems: Problems) -> None:
    """The digests of the manifest, where there is one, against whole files."""
    if not (destination / MANIFEST_NAME).is_file():
        return
    told = read_json(destination, MANIFEST_NAME).get("files", {})
    for path in sorted(told.keys() ^ {file.path for file in files}):
        problems.append(DifferenceError(f"{quoted(path)} is {'missing' if path in told else 'not in the manifest'}"))
    for file in files:
        if file.path in told and _digest(destination / file.path) != told[file.path].get("xxh3_128"):
            problems.append(DifferenceError(f"{quoted(file.path)} does not have the digest in {MANIFEST_NAME}"))


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb") as stream:
        while block := stream.read(BAND_NBYTES):
            digest.update(block)
    return digest.hexdigest()


class _Comparison:
    """One Nanotron parameter, on all its ranks, against the Hugging Face tensors it is made of."""

    def __init__(self, source: Path, tensors: Mapping[str, StoredTensor], root: Path, fused: list[Parameter],
                 files: list[TensorFile], interleaved: bool):
        """`tensors` are those of the source, by their names; `files` are below `root`."""
        self.source, self.tensors, self.root = source, tensors, root
        self.fused, self.files, self.interleaved = fused, files, interleaved
        self.rows = [parameter.matrix_shape[0] for parameter in fused]

    def run(self) -> None:
        """Raises DifferenceError at the first element that differs."""
        held = [pair for file in self.files for pair in self._held(file)]
        shape = self._unsharded_shape(self.files[0])
        if fault := tiling_fault([pair.origin for pair in held], Box.whole(shape)):
            raise DifferenceError(f"{self.files[0].path} and its other ranks: {fault}")
        own = (sum(self.rows), *self.fused[0].matrix_shape[1:])
        if shape[1:] != own[1:] or shape[0] < own[0] or (shape[0] > own[0] and self.fused[0].dims[0] != "vocab"):
            raise DifferenceError(f"{self.files[0].path}: unsharded shape {shape}, but the source has {own}")
        for pair in held:
            self._compare(pair)

    def _unsharded_shape(self, file: TensorFile) -> tuple[int, ...]:
        text = dict(file.metadata).get("unsharded_shape")
        if text is None:
            return file.tensors[0].shape
        return tuple(int(number) for number in re.findall(r"\d+", re.sub(r"np\.int64\((\d+)\)", r"\1", text)))

    def _held(self, file: TensorFile) -> list[Held]:
        tensor, metadata = file.tensors[0], dict(file.metadata)
        if not metadata:
            return [Held(tensor, Box.whole(tensor.shape), Box.whole(tensor.shape))]
        if set(metadata) != {"version", "unsharded_shape", "local_global_slices_pairs"}:
            raise DifferenceError(f"{file.path}: Nanotron's strict reader refuses the header fields {sorted(metadata)}")
        try:
            held = [Held(tensor, *boxes) for boxes in parse_pairs(
                metadata["local_global_slices_pairs"], tensor.shape, self._unsharded_shape(file))]
        except DifferenceError as error:
            raise DifferenceError(f"{file.path}: {error}") from error
        if fault := tiling_fault([pair.local for pair in held], Box.whole(tensor.shape)):
            raise DifferenceError(f"{file.path}: {fault}")
        return held

    def _compare(self, pair: Held) -> None:
        """Row by row in bands: what the file holds against what the source holds at the global place."""
        width = max(1, int(np.prod(self._unsharded_shape(self.files[0])[1:])))
        num_rows = max(1, BAND_NBYTES // (width * pair.tensor.itemsize))
        stored = SourceFile(self.root, pair.tensor.file)
        try:
            for first in range(0, pair.local.shape[0], num_rows):
                last = min(first + num_rows, pair.local.shape[0])
                got = _rows(stored, pair.tensor, pair.local.start[0] + first, pair.local.start[0] + last)
                want = self._expected(pair.origin.start[0] + first, pair.origin.start[0] + last, pair.tensor.dtype)
                if want.ndim == 2:
                    got = got[:, pair.local.start[1]:pair.local.stop[1]]
                    want = want[:, pair.origin.start[1]:pair.origin.stop[1]]
                if not np.array_equal(got, want):
                    where = tuple(int(i) for i in np.argwhere(got != want)[0])
                    raise DifferenceError(
                        f"{pair.tensor.file}: {self.fused[0].nanotron} differs at local "
                        f"{(where[0] + first, *where[1:])}: bytes {got[where].tobytes().hex()} here, "
                        f"{want[where].tobytes().hex()} in the source")
        finally:
            stored.close()

    def _expected(self, first: int, last: int, dtype: str) -> np.ndarray:
        """Rows first to last of the unsharded tensor, from the source; zeros past the end of the vocabulary."""
        found, begin = [], 0
        for parameter, num_rows in zip(self.fused, self.rows):
            start, stop = max(first, begin) - begin, min(last, begin + num_rows) - begin
            if start < stop:
                found.append(self._source_rows(parameter, start, stop, dtype))
            begin += num_rows
        if last > begin:
            padding = (last - max(first, begin), *self.fused[0].matrix_shape[1:])
            found.append(np.zeros(padding, dtype=f"u{ITEMSIZE[dtype]}"))
        return np.concatenate(found)

    def _source_rows(self, parameter: Parameter, start: int, stop: int, dtype: str) -> np.ndarray:
        """Rows of one Hugging Face tensor, in the order in which Nanotron keeps the rows of a head."""
        tensor = self.tensors[parameter.hugging_face]
        rows = np.arange(start, stop)
        if self.interleaved and "half" in parameter.dims:
            pairs = parameter.shape[parameter.dims.index("pair")]
            head, inside = np.divmod(rows, 2 * pairs)
            pair, half = np.divmod(inside, 2)
            rows = head * 2 * pairs + half * pairs + pair
        opened = SourceFile(self.source, tensor.file)
        try:
            lowest = int(rows.min())
            return _rows(opened, tensor, lowest, int(rows.max()) + 1, dtype)[rows - lowest]
        finally:
            opened.close()


def _rows(file: SourceFile, tensor: StoredTensor, first: int, last: int, dtype: str | None = None) -> np.ndarray:
    """Rows of a stored tensor as unsigned integers of the elements' bits, cast to `dtype` first."""
    row_nbytes = tensor.nbytes // tensor.shape[0]
    view = memoryview(bytearray((last - first) * row_nbytes))
    file.read_into(view, tensor.begin + first * row_nbytes)
    dtype = dtype or tensor.dtype
    bits = np.frombuffer(cast(view, tensor.dtype, dtype), dtype=f"u{ITEMSIZE[dtype]}")
    return bits.reshape(last - first, *tensor.shape[1:])
