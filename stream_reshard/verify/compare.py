"""Comparing one parameter of two checkpoints, element by element, in bands of rows."""
from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from stream_reshard.casts import cast
from stream_reshard.errors import DifferenceError, quoted
from stream_reshard.header import ITEMSIZE
from stream_reshard.layouts.base import TORCH_DTYPES
from stream_reshard.stop import Stop
from stream_reshard.verify.checkpoint import Checkpoint, Opened, Weight, bands


@dataclass(frozen=True)
class Rule:
    """What of the parameters is compared, and how."""

    band_nbytes: int
    """About the size of what is read of either checkpoint at a time."""
    vocab_size: int
    """Rows of embedding and head that hold weights; rows past them are padding."""
    dtype: str | None = None
    """The safetensors dtype the source is cast to first; None where the copy must have the source's own."""
    sample: float = 1.0
    """Part of the bands that are compared."""
    seed: int = 0
    """Chooses them."""
    padding_is_zero: bool = True
    """Whether rows past the vocabulary must be zero."""


@dataclass(frozen=True)
class Compared:
    """What the comparison of one parameter, or of one file's digest, saw."""

    num_elements: int
    """Weights compared, without padding."""
    difference: DifferenceError | None = None
    """The first difference."""
    is_digest: bool = False
    """Whether it was the digest of a file that was compared."""


def compare(name: str, source: Checkpoint, copy: Checkpoint, rule: Rule, stop: Stop) -> Compared:
    """Compare a parameter that both have; ends at the first difference."""
    ours, theirs = copy.weights[name], source.weights[name]
    if fault := shape_difference(name, source, copy, rule):
        return Compared(0, fault)
    num_rows, num_compared = ours.num_true_rows(rule.vocab_size), 0
    with Opened(source.root, theirs) as expected, Opened(copy.root, ours) as got:
        for first, last in _chosen(name, num_rows, ours, rule):
            stop.check()
            want, have = _cast(expected.rows(first, last), theirs.dtype, ours.dtype), got.rows(first, last)
            num_compared += have.size
            if difference := _difference(have, want, first, ours, theirs):
                return Compared(num_compared, difference)
        num_padding = ours.num_rows - num_rows if rule.padding_is_zero else 0
        for first, last in bands(num_padding, ours.num_columns * ITEMSIZE[ours.dtype], rule.band_nbytes):
            have = got.rows(num_rows + first, num_rows + last)
            if difference := _difference(have, np.zeros_like(have), num_rows + first, ours, None):
                return Compared(num_compared, difference)
    return Compared(num_compared)


def _title(weight: Weight) -> str:
    return weight.parameter.hugging_face


def shape_difference(name: str, source: Checkpoint, copy: Checkpoint, rule: Rule) -> DifferenceError | None:
    """Where shape or dtype of a parameter are not what the source asks for."""
    ours = copy.weights[name]
    fault = _shape_fault(ours, source.weights[name], rule)
    return DifferenceError(f"{quoted(ours.pieces[0].tensor.file)}: {_title(ours)} {fault}") if fault else None


def _shape_fault(ours: Weight, theirs: Weight, rule: Rule) -> str | None:
    is_vocab = ours.parameter.dims[0] == "vocab"
    shapes = (ours.num_rows, ours.num_columns), (theirs.num_rows, theirs.num_columns)
    if ours.num_columns != theirs.num_columns or (ours.num_rows != theirs.num_rows and not is_vocab):
        return f"has the shape {shapes[0]}, in the source {shapes[1]}"
    if is_vocab and min(ours.num_rows, theirs.num_rows) < rule.vocab_size:
        return f"has {ours.num_rows} rows, in the source {theirs.num_rows}, for a vocabulary of {rule.vocab_size}"
    if ours.parameter.is_float32 and {ours.dtype, theirs.dtype} <= set(TORCH_DTYPES):
        return None
    if ours.dtype != (rule.dtype or theirs.dtype) or (theirs.dtype != ours.dtype and theirs.dtype not in TORCH_DTYPES):
        cast_to = f", cast to {rule.dtype}" if rule.dtype else ""
        return f"has the dtype {ours.dtype}, in the source {theirs.dtype}{cast_to}"
    return None


def _chosen(name: str, num_rows: int, weight: Weight, rule: Rule) -> Iterator[tuple[int, int]]:
    """The bands to compare: all of them, or a seeded part, at least one."""
    every = bands(num_rows, weight.num_columns * ITEMSIZE[weight.dtype], rule.band_nbytes)
    if rule.sample >= 1:
        return every
    listed, chooser = list(every), random.Random(f"{rule.seed} {name}")
    return iter(sorted(chooser.sample(listed, max(1, round(rule.sample * len(listed))))))


def _cast(rows: np.ndarray, source: str, target: str) -> np.ndarray:
    if source == target:
        return rows
    bits = cast(np.ascontiguousarray(rows).data.cast("B"), source, target)
    return np.frombuffer(bits, f"u{ITEMSIZE[target]}").reshape(rows.shape)


def _difference(have: np.ndarray, want: np.ndarray, first: int, ours: Weight,
                theirs: Weight | None) -> DifferenceError | None:
    """The first element that differs, by file, parameter, index and both values. `theirs` is None for padding."""
    differs = have != want
    if not differs.any():
        return None
    at = int(differs.argmax())
    row, column = divmod(at, have.shape[1])
    tensor, local = ours.place_of(first + row, column)
    index = (first + row, column)[:len(ours.parameter.matrix_shape)]
    if theirs is None:
        other = "but it is padding, which must be zero"
    else:
        place, there = theirs.place_of(first + row, column)
        other = f"the source has {_value(want[row, column], ours.dtype)} ({quoted(place.file)}, {list(there)})"
    return DifferenceError(f"{quoted(tensor.file)}: {_title(ours)} {list(index)} is "
                           f"{_value(have[row, column], ours.dtype)} at {list(local)} of the file; {other}")


def _value(bits: np.unsignedinteger, dtype: str) -> str:
    """`0.0123 (0x3c4a)`."""
    raw = f"0x{int(bits):0{2 * ITEMSIZE[dtype]}x}"
    if dtype == "BF16":
        return f"{np.array(int(bits) << 16, np.uint32).view(np.float32):.6g} ({raw})"
    kind = {"F16": np.float16, "F32": np.float32, "F64": np.float64}.get(dtype)
    return f"{np.array(bits).view(kind):.6g} ({raw})" if kind else raw
