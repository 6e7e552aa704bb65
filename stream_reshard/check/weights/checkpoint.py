"""A checkpoint as verify sees it, of whatever format: matrices that can be read by rows.

Every parameter is the matrix that Hugging Face stores (a vector is one column), in Hugging Face's order of rows. Pieces
say options a format keeps it: a box of the matrix, and the box of a stored tensor that holds it. Nothing of the planner
is used here, neither its slices nor its arithmetic: a wrong plan cannot agree with itself.
"""
from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from stream_reshard.formats.unsupported import Unsupported
from stream_reshard.model.box import Box
from stream_reshard.model.parameters import Model, ModelConfig, Parameter
from stream_reshard.model.topology import Topology
from stream_reshard.storage.dtypes import ITEMSIZE
from stream_reshard.storage.header import StoredTensor
from stream_reshard.storage.source_file import SourceFile

Block = tuple[int, int, int, int]
"""(first row, past the last, first column, past the last) of a matrix."""


@dataclass(frozen=True)
class Piece:
    """A box of a parameter's matrix, and the box of a stored tensor that holds it."""

    origin: Box
    """(rows, columns) of the matrix, in the order in which the format keeps the rows."""
    tensor: StoredTensor
    local: Box
    """(rows, columns) of the tensor; of three dims the first two count as rows."""
    is_transposed: bool = False
    """True where the tensor has the columns of `origin` as rows."""

    def index_of(self, row: int, column: int) -> tuple[int, ...]:
        """Index in the tensor of an element of the matrix, whose rows are in the format's order."""
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
    """The rows of a head alternate between its two halves."""

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
        """Indices at which the format keeps Hugging Face's rows first to last: within a head of d rows, row j of the
        first half stands at 2j, row j of the second at 2j + 1."""
        rows: np.ndarray = np.arange(first, last)
        if not self.interleaved:
            return rows
        half = self.parameter.shape[self.parameter.dims.index("pair")]
        head, inside = np.divmod(rows, 2 * half)
        kept: np.ndarray = head * 2 * half + 2 * (inside % half) + inside // half
        return kept

    def origin_of(self, row: int, column: int) -> tuple[StoredTensor, tuple[int, ...]]:
        """(tensor, index in it) of one element of the matrix, row in Hugging Face's order."""
        row = int(self.kept_rows(row, row + 1)[0])
        for piece in self.pieces:
            if piece.origin.contains(Box((row, column), (row + 1, column + 1))):
                return piece.tensor, piece.index_of(row, column)
        raise AssertionError("the pieces cover the matrix")


def matrix_of(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, columns) of a stored array: a vector is one column."""
    return (*shape, 1) if len(shape) == 1 else (shape[0], shape[1])


class Weights(Mapping[str, Weight]):
    """The parameters of a checkpoint, by name. A large one has many, so each is made when it is asked for."""

    @abstractmethod
    def __contains__(self, name: object) -> bool:
        """True where the checkpoint has the parameter; no weight is made for the answer."""

    @abstractmethod
    def dtype_of(self, name: str) -> str:
        """safetensors' name of the dtype of a parameter."""

    @abstractmethod
    def paths_of(self, name: str) -> Sequence[str]:
        """The files that a parameter stands in."""


@dataclass(frozen=True)
class Checkpoint:
    """One of the two checkpoints that are compared."""

    root: Path
    model: Model
    """The vocabulary of a Nanotron model includes its padding."""
    vocab_size: int | None
    """Rows of the embedding without padding, where the folder says it."""
    extras: Mapping[str, Unsupported]
    """Settings beyond the config that change the forward pass, by name."""
    paths: Collection[str]
    """Paths of the weight files."""
    weights: Weights
    unsaid: Collection[str] = ()
    """Settings of the config that this format cannot express."""
    dtype: str | None = None
    """The dtype that the config tells its readers to load the weights in, under torch's name; None where it says
    nothing."""
    topology: Topology | None = None
    """The topology in the names of the files; None where they are not Nanotron's."""
    interleaved: bool = False
    """Rotary embedding interleaves the rows of a head."""
    interleaved_by_default: bool = False
    """Rotary embedding interleaves the rows of a head where the config does not say whether."""
    num_moved: int = 0
    """Files on other stages than Nanotron's balancing gives them, where that is allowed."""
    is_whole: bool = False
    """True where Nanotron itself saved the config of the model: it writes every field."""
    knows_ids: bool = True
    """False where only those token ids are known that Nanotron's config can hold."""
    padding_id: int | None = None
    """The token id for padding in a Nanotron config, which stops the training of that row on every rank."""

    @property
    def config(self) -> ModelConfig:
        """The config of the model."""
        return self.model.config

    @property
    def is_nanotron(self) -> bool:
        """True for a Nanotron checkpoint."""
        return self.topology is not None

    def num_elements(self, vocab_size: int) -> int:
        """Weights that the files hold, without padding."""
        return replace(self.model, config=replace(self.config, vocab_size=vocab_size)).num_elements


class Opened:
    """A weight opened for reading; a context manager."""

    def __init__(self, root: Path, weight: Weight, max_nbytes: int):
        """`max_nbytes`: about the size of one read; twice that where the weight is interleaved."""
        self.weight, self._max_nbytes = weight, max_nbytes
        self._stack = ExitStack()
        try:
            self._files = {path: self._stack.enter_context(SourceFile(root, path))
                           for path in dict.fromkeys(piece.tensor.file for piece in weight.pieces)}
        except BaseException:
            self._stack.close()
            raise

    def block(self, first: int, last: int, left: int, right: int) -> np.ndarray:
        """Rows first to last in Hugging Face's order, columns left to right, as unsigned integers of the elements'
        bits."""
        if not self.weight.interleaved:
            return self._kept(first, last, left, right)
        kept = self.weight.kept_rows(first, last)
        lowest, highest = int(kept.min()), int(kept.max()) + 1
        if (highest - lowest) * (right - left) * ITEMSIZE[self.weight.dtype] <= 2 * self._max_nbytes:
            rows: np.ndarray = self._kept(lowest, highest, left, right)[kept - lowest]
        else:
            rows = np.concatenate([self._kept(row, row + 1, left, right) for row in map(int, kept)])
        return rows

    def _kept(self, first: int, last: int, left: int, right: int) -> np.ndarray:
        """Rows first to last, columns left to right, in the format's order of rows."""
        weight, window = self.weight, Box((first, left), (last, right))
        block: np.ndarray = np.empty(window.shape, f"u{ITEMSIZE[weight.dtype]}")
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
        """A box of (rows, columns) of a tensor: in one go where its rows are whole, else a run of each row."""
        part: np.ndarray = np.empty(place.shape, f"u{tensor.itemsize}")
        width = matrix_of(tensor.shape)[1] if len(tensor.shape) < 3 else tensor.shape[-1]
        (top, left), file = place.start, self._files[tensor.file]
        if place.shape[1] == width:
            file.read_into(part.data.cast("B"), tensor.begin + top * width * tensor.itemsize)
            return part
        for row, view in enumerate(part):
            file.read_into(view.data.cast("B"), tensor.begin + ((top + row) * width + left) * tensor.itemsize)
        return part

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()


def blocks(num_rows: int, num_columns: int, itemsize: int, max_nbytes: int) -> Iterator[Block]:
    """Blocks of about `max_nbytes` in the order of their elements: as many whole rows as fit, or parts of one."""
    num_elements = max(1, max_nbytes // itemsize)
    step, width = max(1, num_elements // num_columns), min(num_columns, num_elements)
    for first in range(0, num_rows, step):
        for left in range(0, num_columns, width):
            yield first, min(first + step, num_rows), left, min(left + width, num_columns)
