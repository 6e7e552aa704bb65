"""A checkpoint of any format, as `verify` reads it: matrices that can be read by rows.

Every parameter is the matrix that Hugging Face stores (a vector is one column), in Hugging Face's order of rows. Its
pieces map it to the stored tensors: a box of the matrix, and the box of a tensor that holds it. The planner's slices
and arithmetic are not used here, so that a wrong plan cannot agree with itself.
"""
from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from stream_reshard.formats.unsupported import Unsupported
from stream_reshard.model.box import Box
from stream_reshard.model.parameters import Model, ModelConfig, Parameter
from stream_reshard.model.topology import Topology
from stream_reshard.storage.dtypes import ITEMSIZE
from stream_reshard.storage.header import StoredTensor
from stream_reshard.storage.source_file import SourceFile

if TYPE_CHECKING:
    from stream_reshard.check.weights.states.state import TrainingState

MAX_OPEN = 64
"""Limit on files that a weight has open at once: with ZeRO-1 a parameter stands in the files of all ranks."""

Block = tuple[int, int, int, int]
"""(first row, past the last row, first column, past the last column) of a matrix."""


@dataclass(frozen=True)
class Piece:
    """A box of a parameter's matrix, and the box of a stored tensor that holds it."""

    origin: Box
    """(rows, columns) of the matrix, with rows in the format's order."""
    tensor: StoredTensor
    local: Box
    """(rows, columns) of the tensor; a tensor of three dims has the rows of its first two."""
    is_transposed: bool = False
    """True if the tensor holds the columns of `origin` as rows."""

    def index_of(self, row: int, column: int) -> tuple[int, ...]:
        """Index in the tensor of an element of the matrix, with rows in the format's order."""
        inside = row - self.origin.start[0], column - self.origin.start[1]
        down, right = reversed(inside) if self.is_transposed else inside
        index = self.local.start[0] + down, self.local.start[1] + right
        if len(self.tensor.shape) == 3:
            return (*divmod(index[0], self.tensor.shape[1]), index[1])
        return index[:len(self.tensor.shape)]


@dataclass(frozen=True)
class Weight:
    """A parameter, and its pieces in one checkpoint."""

    parameter: Parameter
    num_rows: int
    """Rows that the pieces cover, padding included."""
    pieces: tuple[Piece, ...]
    interleaved: bool = False
    """True if the rows of a head alternate between its two halves."""
    state: str = ""
    """Kind of a state of the optimizer, such as exp_avg; "" for the weights of the model."""
    rounded_to: str = ""
    """The dtype to which the stored float32 is rounded when it is read; "" to read it as it is."""

    @property
    def title(self) -> str:
        """Its name for people."""
        return f"{self.state} of {self.parameter.hugging_face}" if self.state else self.parameter.hugging_face

    @property
    def stored_dtype(self) -> str:
        """safetensors' name of the dtype in the file."""
        return self.pieces[0].tensor.dtype

    @property
    def dtype(self) -> str:
        """safetensors' name of the dtype in which it is read."""
        return self.rounded_to or self.stored_dtype

    def num_true_rows(self, vocab_size: int) -> int:
        """Rows without padding."""
        return min(self.num_rows, vocab_size) if self.parameter.dims[0] == "vocab" else self.num_rows

    @property
    def num_columns(self) -> int:
        """Columns of the matrix; 1 for a vector."""
        return matrix_of(self.parameter.matrix_shape)[1]

    def kept_rows(self, first: int, last: int) -> np.ndarray:
        """Indices, in the format's order, of Hugging Face's rows first to last. In an interleaved head, row j of the
        first half is at 2j, row j of the second half at 2j + 1."""
        rows: np.ndarray = np.arange(first, last)
        if not self.interleaved:
            return rows
        half = self.parameter.shape[self.parameter.dims.index("pair")]
        head, inside = np.divmod(rows, 2 * half)
        kept: np.ndarray = head * 2 * half + 2 * (inside % half) + inside // half
        return kept

    def origin_of(self, row: int, column: int) -> tuple[StoredTensor, tuple[int, ...]]:
        """(tensor, index in it) of an element of the matrix, with rows in Hugging Face's order."""
        row = int(self.kept_rows(row, row + 1)[0])
        element = Box((row, column), (row + 1, column + 1))
        piece = next(piece for piece in self.pieces if piece.origin.contains(element))
        return piece.tensor, piece.index_of(row, column)


def matrix_of(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, columns) of a stored array: a vector is one column."""
    return (*shape, 1) if len(shape) == 1 else (shape[0], shape[1])


class Weights(Mapping[str, Weight]):
    """The parameters of a checkpoint by name, each derived when it is asked for: a large checkpoint has many."""

    @abstractmethod
    def __contains__(self, name: object) -> bool:
        """True if the checkpoint has the parameter; its Weight is not derived."""

    @abstractmethod
    def dtype_of(self, name: str) -> str:
        """safetensors' name of the dtype of a parameter."""

    @abstractmethod
    def paths_of(self, name: str) -> Sequence[str]:
        """Paths of the files that hold a parameter."""


@dataclass(frozen=True)
class Checkpoint:
    """One of the two checkpoints that are compared."""

    root: Path
    model: Model
    """The vocabulary of a Nanotron model includes its padding."""
    vocab_size: int | None
    """Rows of the embedding without padding; None if the folder does not state them."""
    extras: Mapping[str, Unsupported]
    """Settings beyond the config that change the forward pass, by name."""
    paths: Collection[str]
    """Paths of the weight files."""
    weights: Weights
    unsaid: Collection[str] = ()
    """Settings in `config` that the checkpoint does not state, as its format version has none of them."""
    dtype: str | None = None
    """The dtype in which transformers loads the weights by the config, under torch's name; None if it states none."""
    topology: Topology | None = None
    """The topology in the names of the files; None for any other checkpoint."""
    interleaved: bool = False
    """True if rotary embedding interleaves the rows of a head."""
    interleaved_by_default: bool = False
    """The value of `interleaved` for a config that does not state it."""
    num_moved: int = 0
    """Number of files on other stages than in Nanotron's balancing."""
    config_class: str | None = None
    """Nanotron's config class."""
    version: str | None = None
    """The format version in the headers of the files."""
    is_whole: bool = False
    """True if Nanotron itself saved the config of the model: it writes every field."""
    knows_ids: bool = True
    """False if the token ids are only those that Nanotron's config can hold."""
    padding_id: int | None = None
    """The token id for padding in a Nanotron config; Nanotron does not train its row on any rank."""

    state: TrainingState | None = None
    """The training state beside the weights; None for weights alone."""

    @property
    def config(self) -> ModelConfig:
        """The config of the model."""
        return self.model.config

    @property
    def is_nanotron(self) -> bool:
        """True for a Nanotron checkpoint."""
        return self.topology is not None

    def num_elements(self, vocab_size: int) -> int:
        """Number of weights that the files hold, without padding."""
        return replace(self.model, config=replace(self.config, vocab_size=vocab_size)).num_elements


class Opened:
    """A weight open for reading; a context manager."""

    def __init__(self, root: Path, weight: Weight, max_nbytes: int):
        """`max_nbytes`: approximate size of one read; twice that for an interleaved weight."""
        self.weight, self._root, self._max_nbytes = weight, root, max_nbytes
        self._files: dict[str, SourceFile] = {}

    def block(self, first: int, last: int, left: int, right: int) -> np.ndarray:
        """The bits, as unsigned integers, of rows first to last in Hugging Face's order, columns left to right."""
        bits = self._ordered(first, last, left, right)
        return rounded(bits, self.weight.rounded_to) if self.weight.rounded_to else bits

    def _ordered(self, first: int, last: int, left: int, right: int) -> np.ndarray:
        """The bits as they are stored, of rows in Hugging Face's order."""
        if not self.weight.interleaved:
            return self._kept(first, last, left, right)
        kept = self.weight.kept_rows(first, last)
        lowest, highest = int(kept.min()), int(kept.max()) + 1
        if (highest - lowest) * (right - left) * ITEMSIZE[self.weight.stored_dtype] <= 2 * self._max_nbytes:
            rows: np.ndarray = self._kept(lowest, highest, left, right)[kept - lowest]
        else:
            rows = np.concatenate([self._kept(row, row + 1, left, right) for row in map(int, kept)])
        return rows

    def _kept(self, first: int, last: int, left: int, right: int) -> np.ndarray:
        """The bits of rows first to last in the format's order, columns left to right."""
        weight, window = self.weight, Box((first, left), (last, right))
        block: np.ndarray = np.empty(window.shape, f"u{ITEMSIZE[weight.stored_dtype]}")
        for piece in weight.pieces:
            if common := piece.origin.overlap(window):
                (top, begin), (bottom, end) = (common.seen_from(window).start, common.seen_from(window).stop)
                inside = common.seen_from(piece.origin)
                if piece.is_transposed:
                    inside = Box(inside.start[::-1], inside.stop[::-1])
                corner = tuple(map(sum, zip(inside.start, piece.local.start)))
                stored = self._stored(piece.tensor, Box(corner, tuple(map(sum, zip(corner, inside.shape)))))
                block[top:bottom, begin:end] = stored.T if piece.is_transposed else stored
        return block

    def _stored(self, tensor: StoredTensor, place: Box) -> np.ndarray:
        """The bits of a box of (rows, columns) of a tensor, read at once for whole rows, else row by row."""
        part: np.ndarray = np.empty(place.shape, f"u{tensor.itemsize}")
        width = matrix_of(tensor.shape)[1] if len(tensor.shape) < 3 else tensor.shape[-1]
        (top, left), file = place.start, self._file(tensor.file)
        if place.shape[1] == width:
            file.read_into(part.data.cast("B"), tensor.begin + top * width * tensor.itemsize)
            return part
        for row, view in enumerate(part):
            file.read_into(view.data.cast("B"), tensor.begin + ((top + row) * width + left) * tensor.itemsize)
        return part

    def _file(self, path: str) -> SourceFile:
        """A file, opened when it is first read. Of many, those are closed that were not read for the longest time."""
        file = self._files.pop(path, None)
        if file is None:
            if len(self._files) >= MAX_OPEN:
                self._files.pop(next(iter(self._files))).close()
            file = SourceFile(self._root, path)
        self._files[path] = file
        return file

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *exception: object) -> None:
        for file in self._files.values():
            file.close()


def rounded(bits: np.ndarray, dtype: str) -> np.ndarray:
    """The bits of float32 values rounded to nearest, ties to even, as bits of another dtype. For bfloat16 half of the
    last kept bit is added, less one bit where that is even."""
    if dtype == "BF16":
        raised: np.ndarray = bits >> 16
        raised &= 1
        raised += bits
        raised += 0x7FFF
        raised >>= 16
        return raised.astype(np.uint16)
    kind = {"F16": np.float16, "F64": np.float64}.get(dtype, np.float32)
    with np.errstate(over="ignore"):
        narrow: np.ndarray = bits.view(np.float32).astype(kind).view(f"u{ITEMSIZE[dtype]}")
    return narrow


def blocks(num_rows: int, num_columns: int, itemsize: int, max_nbytes: int) -> Iterator[Block]:
    """Blocks of about `max_nbytes` in the order of their elements: as many whole rows as fit, or parts of a row."""
    num_elements = max(1, max_nbytes // itemsize)
    step, width = max(1, num_elements // num_columns), min(num_columns, num_elements)
    for first in range(0, num_rows, step):
        for left in range(0, num_columns, width):
            yield first, min(first + step, num_rows), left, min(left + width, num_columns)
