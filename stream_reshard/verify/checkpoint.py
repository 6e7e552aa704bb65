"""A checkpoint as verify sees it, of whatever format: matrices that can be read by rows.

Every parameter is the matrix that Hugging Face stores (a vector is one column), in Hugging Face's order of rows. How a
format keeps it is said in pieces: a box of the matrix, and the box of a stored tensor where it stands. Nothing of the
planner is used here, neither its slices nor its arithmetic: a wrong plan cannot agree with itself.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stream_reshard.box import Box
from stream_reshard.header import ITEMSIZE, StoredTensor, TensorFile
from stream_reshard.layouts.limits import Limit
from stream_reshard.model import ModelConfig, Parameter
from stream_reshard.tensor_file import SourceFile


PER_TENSOR = 100
"""Bytes of a header that take as much memory as what is held here of one tensor."""


@dataclass(frozen=True)
class Piece:
    """A box of a parameter's matrix, and where it stands."""

    origin: Box
    """(rows, columns) of the matrix, in the order in which the format keeps the rows."""
    tensor: StoredTensor
    local: Box
    """(rows, columns) of the tensor; of three dims the first two count as rows."""
    is_transposed: bool = False
    """Whether the tensor has the columns of `origin` as rows."""

    def index_of(self, row: int, column: int) -> tuple[int, ...]:
        """Where an element of the matrix, in the format's order of rows, stands in the tensor."""
        inside = row - self.origin.start[0], column - self.origin.start[1]
        down, right = reversed(inside) if self.is_transposed else inside
        index = self.local.start[0] + down, self.local.start[1] + right
        if len(self.tensor.shape) == 3:
            return (*divmod(index[0], self.tensor.shape[1]), index[1])
        return index[:len(self.tensor.shape)]


@dataclass(frozen=True)
class Weight:
    """A parameter as one checkpoint holds it."""

    parameter: Parameter
    num_rows: int
    """Rows that the pieces cover, padding included."""
    pieces: tuple[Piece, ...]
    interleaved: bool = False
    """Whether the rows of a head alternate between its two halves."""

    @property
    def dtype(self) -> str:
        """safetensors' name of the dtype."""
        return self.pieces[0].tensor.dtype

    def num_true_rows(self, vocab_size: int) -> int:
        """Rows that are no padding."""
        return min(self.num_rows, vocab_size) if self.parameter.dims[0] == "vocab" else self.num_rows

    @property
    def num_columns(self) -> int:
        """1 for a vector."""
        return matrix_of(self.parameter.matrix_shape)[1]

    def kept_rows(self, first: int, last: int) -> np.ndarray:
        """Where the format keeps Hugging Face's rows first to last: within a head of d rows, row j of the first half
        stands at 2j, row j of the second at 2j + 1."""
        rows = np.arange(first, last)
        if not self.interleaved:
            return rows
        half = self.parameter.shape[self.parameter.dims.index("pair")]
        head, inside = np.divmod(rows, 2 * half)
        return head * 2 * half + 2 * (inside % half) + inside // half

    def place_of(self, row: int, column: int) -> tuple[StoredTensor, tuple[int, ...]]:
        """(tensor, index in it) of one element of the matrix, row in Hugging Face's order."""
        row = int(self.kept_rows(row, row + 1)[0])
        for piece in self.pieces:
            if piece.origin.contains(Box((row, column), (row + 1, column + 1))):
                return piece.tensor, piece.index_of(row, column)
        raise AssertionError("the pieces cover the matrix")


def matrix_of(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, columns) of a stored array: a vector is one column."""
    return (*shape, 1) if len(shape) == 1 else (shape[0], shape[1])


@dataclass(frozen=True)
class Checkpoint:
    """One of the two checkpoints that are compared."""

    root: Path
    config: ModelConfig
    """Of Nanotron's, `vocab_size` is the padded one."""
    vocab_size: int | None
    """Rows of the embedding without padding, where the folder says it."""
    extras: Mapping[str, Limit]
    """Settings beyond `config` that change the forward pass, by name."""
    interleaved: bool
    """Whether rotary embedding interleaves the rows of a head."""
    interleaved_by_default: bool
    """The same, for a config that does not say it."""
    files: tuple[TensorFile, ...]
    weights: Mapping[str, Weight]
    """By parameter."""
    knows_ids: bool = True
    """False where the token ids are no more than what Nanotron's config could hold of those of the model."""
    padding_id: int | None = None
    """The token id for padding in a Nanotron config, which stops the training of that row on every rank."""

    def num_elements(self, vocab_size: int) -> int:
        """Weights that the files hold, without padding."""
        return sum(weight.num_true_rows(vocab_size) * weight.num_columns for weight in self.weights.values())


class Opened:
    """A weight opened for reading; a context manager."""

    def __init__(self, root: Path, weight: Weight):
        self.weight = weight
        self._stack = ExitStack()
        try:
            self._files = {path: self._stack.enter_context(SourceFile(root, path))
                           for path in dict.fromkeys(piece.tensor.file for piece in weight.pieces)}
        except BaseException:
            self._stack.close()
            raise

    def rows(self, first: int, last: int) -> np.ndarray:
        """Rows first to last in Hugging Face's order, as unsigned integers of the elements' bits."""
        kept = self.weight.kept_rows(first, last)
        lowest = int(kept.min())
        band = self._kept_rows(lowest, int(kept.max()) + 1)
        return band[kept - lowest] if self.weight.interleaved else band

    def _kept_rows(self, first: int, last: int) -> np.ndarray:
        weight = self.weight
        band: np.ndarray = np.empty((last - first, weight.num_columns), f"u{ITEMSIZE[weight.dtype]}")
        for piece in weight.pieces:
            start, stop = max(first, piece.origin.start[0]), min(last, piece.origin.stop[0])
            if start < stop and piece.is_transposed:
                band[start - first:stop - first] = self._columns(piece, start, stop).T
            elif start < stop:
                down = piece.local.start[0] - piece.origin.start[0]
                columns = slice(piece.origin.start[1], piece.origin.stop[1])
                stored = self._stored_rows(piece.tensor, start + down, stop + down)
                band[start - first:stop - first, columns] = stored[:, piece.local.start[1]:piece.local.stop[1]]
        return band

    def _columns(self, piece: Piece, first: int, last: int) -> np.ndarray:
        """What a transposed piece has of rows first to last, as it stands there: a run of elements in each row."""
        tensor, top = piece.tensor, piece.local.start[0]
        tile: np.ndarray = np.empty((piece.local.shape[0], last - first), f"u{tensor.itemsize}")
        for row, view in enumerate(tile):
            index = (top + row) * tensor.shape[-1] + piece.local.start[1] + first - piece.origin.start[0]
            self._files[tensor.file].read_into(view.data.cast("B"), tensor.begin + index * tensor.itemsize)
        return tile

    def _stored_rows(self, tensor: StoredTensor, first: int, last: int) -> np.ndarray:
        rows: np.ndarray = np.empty((last - first, matrix_of(tensor.shape)[1]), f"u{tensor.itemsize}")
        row_nbytes = rows.shape[1] * tensor.itemsize
        self._files[tensor.file].read_into(rows.data.cast("B"), tensor.begin + first * row_nbytes)
        return rows

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()


def bands(num_rows: int, row_nbytes: int, band_nbytes: int) -> Iterator[tuple[int, int]]:
    """(first, last) rows of bands of about `band_nbytes`, at least one row each."""
    step = max(1, band_nbytes // row_nbytes)
    return ((first, min(first + step, num_rows)) for first in range(0, num_rows, step))
