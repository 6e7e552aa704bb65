"""Weights: products with the tensors of one checkpoint, in float32, by bands of rows: no whole matrix is in memory."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from stream_reshard.check.forward.settings import DTYPES
from stream_reshard.machine.stop import Stop
from stream_reshard.storage.header import StoredTensor
from stream_reshard.storage.source_file import SourceFile


class Bands:
    """Two buffers that all products of a run share: for a band of rows as it is stored, and in float32."""

    def __init__(self, nbytes: int):
        """`nbytes`: approximate size of a stored band, which has one row at least."""
        self.nbytes = nbytes
        self._stored = bytearray()
        self._floats = torch.empty(0)

    def num_rows(self, row_nbytes: int) -> int:
        """Rows of one band."""
        return max(1, self.nbytes // max(1, row_nbytes))

    def stored(self, nbytes: int) -> memoryview:
        """A buffer of `nbytes` bytes."""
        if len(self._stored) < nbytes:
            self._stored = bytearray(nbytes)
        return memoryview(self._stored)[:nbytes]

    def floats(self, num_rows: int, num_columns: int) -> Tensor:
        """A matrix without content."""
        if self._floats.numel() < num_rows * num_columns:
            self._floats = torch.empty(num_rows * num_columns)
        return self._floats[:num_rows * num_columns].view(num_rows, num_columns)


class Weights:
    """Reader of the tensors in the files below `root`."""

    def __init__(self, root: Path, bands: Bands, stop: Stop, dtype: torch.dtype | None = None):
        """`dtype`: weights are rounded to it first; None leaves them as they are stored."""
        self._root, self._bands, self._stop, self._dtype = root, bands, stop, dtype

    def as_stored(self) -> Weights:
        """A reader of the same files that rounds no weight."""
        return Weights(self._root, self._bands, self._stop)

    def linear(self, x: Tensor, weight: StoredTensor, bias: StoredTensor | None = None, first: int = 0,
               last: int | None = None) -> Tensor:
        """x (num_tokens, columns) times rows first to last of `weight` (rows, columns): (num_tokens, last - first)."""
        last = weight.shape[0] if last is None else last
        out = x.new_empty(len(x), last - first)
        for begin, rows in self._rows(weight, first, last):
            out[:, begin - first:begin - first + len(rows)] = x @ rows.T
        return out if bias is None else out + self.vector(bias)

    def stacked(self, x: Tensor, weight: StoredTensor, index: int) -> Tensor:
        """x (num_tokens, rows) times matrix `index` of `weight` (matrices, rows, columns): (num_tokens, columns)."""
        _, num_rows, num_columns = weight.shape
        out = x.new_zeros(len(x), num_columns)
        for begin, rows in self._rows(weight, index * num_rows, (index + 1) * num_rows):
            begin -= index * num_rows
            out += x[:, begin:begin + len(rows)] @ rows
        return out

    def vector(self, tensor: StoredTensor) -> Tensor:
        """A tensor of one dim, as float32."""
        with SourceFile(self._root, tensor.file) as file:
            return self._band(file, tensor, 0, tensor.shape[0], 1).flatten().clone()

    def picked(self, tensor: StoredTensor, indices: Sequence[int]) -> Tensor:
        """Rows of a matrix by their indices, which alone are read: (len(indices), columns)."""
        out = torch.empty(len(indices), tensor.shape[1])
        with SourceFile(self._root, tensor.file) as file:
            for position, index in enumerate(indices):
                self._stop.check()
                out[position] = self._band(file, tensor, index, index + 1, tensor.shape[1])
        return out

    def _rows(self, tensor: StoredTensor, first: int, last: int) -> Iterator[tuple[int, Tensor]]:
        """(index of the first row, rows in float32) of each band; the next band overwrites them. A tensor of three dims
        has the rows of its first two."""
        num_columns = tensor.shape[-1]
        step = self._bands.num_rows(num_columns * tensor.itemsize)
        with SourceFile(self._root, tensor.file) as file:
            for begin in range(first, last, step):
                self._stop.check()
                yield begin, self._band(file, tensor, begin, min(begin + step, last), num_columns)

    def _band(self, file: SourceFile, tensor: StoredTensor, first: int, last: int, num_columns: int) -> Tensor:
        row_nbytes = num_columns * tensor.itemsize
        view = self._bands.stored((last - first) * row_nbytes)
        file.read_into(view, tensor.begin + first * row_nbytes)
        stored = torch.frombuffer(view, dtype=getattr(torch, DTYPES[tensor.dtype])).view(last - first, num_columns)
        if self._dtype is not None:
            stored = stored.to(self._dtype)
        return self._bands.floats(last - first, num_columns).copy_(stored)
