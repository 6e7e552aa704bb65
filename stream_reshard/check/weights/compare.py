"""Comparison of one parameter of two checkpoints, element by element, in blocks of rows."""
from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from stream_reshard.check.weights.checkpoint import Block, Checkpoint, Opened, Weight, blocks
from stream_reshard.errors import DifferenceError, quoted
from stream_reshard.machine.stop import Stop
from stream_reshard.storage.casts import cast
from stream_reshard.storage.dtypes import ITEMSIZE, TORCH_DTYPES


@dataclass(frozen=True)
class Rule:
    """Settings that the comparisons of all parameters share."""

    block_nbytes: int
    """Approximate number of bytes read from each checkpoint at a time."""
    vocab_size: int
    """Rows of embedding and head without padding."""
    dtype: str | None = None
    """The safetensors dtype to which the source is cast first; None if the copy must have the source's dtype."""
    sample: float = 1.0
    """Fraction of the blocks that are compared."""
    seed: int = 0
    """Seed for the choice of blocks."""
    padding_is_zero: bool = True
    """True if the copy's padding must be zero."""
    source_padding_is_known: bool = True
    """True if the source or a user states the size of the source's vocabulary; if not, rows of the source past the
    copy's vocabulary must be zero."""
    other: str = "the source has"
    """The words before the value of the other side, in a message."""


@dataclass(frozen=True)
class Compared:
    """Result of comparing one parameter, or the digest of one file."""

    num_elements: int
    """Number of weights compared, without padding."""
    difference: DifferenceError | None = None
    """The first difference."""
    is_digest: bool = False
    """True for the digest of a file."""
    num_states: int = 0
    """Number of moments and masters compared with those of the source."""


def compare(name: str, source: Checkpoint, copy: Checkpoint, rule: Rule, stop: Stop) -> Compared:
    """Compare a parameter of both checkpoints, up to the first difference."""
    if difference := shape_difference(name, source, copy, rule):
        return Compared(0, difference)
    source_weight, copy_weight = source.weights[name], copy.weights[name]
    dtype, num_rows, num_compared = compared_as(name, source, copy, rule), copy_weight.num_true_rows(rule.vocab_size), 0
    with (Opened(source.root, source_weight, rule.block_nbytes) as source_file,
          Opened(copy.root, copy_weight, rule.block_nbytes) as copy_file):
        for block in _chosen(name, num_rows, copy_weight, dtype, rule):
            stop.check()
            expected = _as(source_file.block(*block), source_weight.dtype, dtype)
            found = _as(copy_file.block(*block), copy_weight.dtype, dtype)
            num_compared += found.size
            if difference := _difference(found, expected, block, dtype, copy_weight, source_weight, rule.other):
                return Compared(num_compared, difference)
        if rule.padding_is_zero:
            difference = _padding_difference(copy_file, num_rows, rule)
        if difference is None and not rule.source_padding_is_known:
            difference = _lost_rows_difference(source_file, num_rows, copy, rule)
        return Compared(num_compared, difference)


def _padding_difference(copy_file: Opened, num_rows: int, rule: Rule) -> DifferenceError | None:
    """The first element of the copy's padding that is not zero."""
    weight = copy_file.weight
    for first, last, left, right in _blocks(weight.num_rows - num_rows, weight, weight.dtype, rule):
        block = num_rows + first, num_rows + last, left, right
        found = copy_file.block(*block)
        if difference := _difference(found, np.zeros_like(found), block, weight.dtype, weight, None):
            return difference
    return None


def _lost_rows_difference(source_file: Opened, num_rows: int, copy: Checkpoint, rule: Rule) -> DifferenceError | None:
    """The first row of the source past the copy's vocabulary that is not zero; only a user can declare it padding."""
    weight = source_file.weight
    for first, last, left, right in _blocks(weight.num_rows - num_rows, weight, weight.dtype, rule):
        rows = source_file.block(num_rows + first, num_rows + last, left, right).any(axis=1)
        if rows.any():
            row = num_rows + first + int(rows.argmax())
            tensor, _ = weight.origin_of(row, left)
            return DifferenceError(
                f"{weight.title}: row {row} of the source is not zero ({quoted(tensor.file)}), but "
                f"{quoted(copy.root)} has a vocabulary of {num_rows} rows; --vocab-size {num_rows} declares the rows "
                f"from there on padding")
    return None


def shape_difference(name: str, source: Checkpoint, copy: Checkpoint, rule: Rule) -> DifferenceError | None:
    """An error for a parameter with another shape or dtype than the source's and the rule ask for."""
    weight = copy.weights[name]
    fault = _shape_fault(weight, source.weights[name], rule, source.is_nanotron == copy.is_nanotron)
    return DifferenceError(f"{quoted(weight.pieces[0].tensor.file)}: {weight.title} {fault}") if fault else None


def _shape_fault(copy: Weight, source: Weight, rule: Rule, are_same_format: bool) -> str | None:
    is_vocab = copy.parameter.dims[0] == "vocab"
    shapes = (copy.num_rows, copy.num_columns), (source.num_rows, source.num_columns)
    if copy.num_columns != source.num_columns or (copy.num_rows != source.num_rows and not is_vocab):
        return f"has the shape {shapes[0]}, in the source {shapes[1]}"
    if is_vocab and min(copy.num_rows, source.num_rows) < rule.vocab_size:
        return f"has {copy.num_rows} rows, in the source {source.num_rows}, for a vocabulary of {rule.vocab_size}"
    wanted = {rule.dtype or source.dtype}
    if copy.parameter.is_float32:
        wanted = wanted | {"F32"} if rule.dtype else wanted if are_same_format else set(TORCH_DTYPES)
    if copy.dtype not in wanted or (source.dtype != copy.dtype and source.dtype not in TORCH_DTYPES):
        cast_to = f", cast to {rule.dtype}" if rule.dtype else ""
        return f"has the dtype {copy.dtype}, in the source {source.dtype}{cast_to}"
    return None


def compared_as(name: str, source: Checkpoint, copy: Checkpoint, rule: Rule) -> str:
    """The dtype in which a parameter is compared: the copy's, to which the source is cast. If no cast is asked for, a
    parameter that Nanotron keeps in float32 is compared in F32 or F64, which hold the bits of both sides."""
    source_dtype, copy_dtype = source.weights.dtype_of(name), copy.weights.dtype_of(name)
    if rule.dtype or copy_dtype == source_dtype or not copy.weights[name].parameter.is_float32:
        return copy_dtype
    return "F64" if "F64" in (source_dtype, copy_dtype) else "F32"


def _blocks(num_rows: int, weight: Weight, dtype: str, rule: Rule) -> Iterator[Block]:
    itemsize = max(ITEMSIZE[weight.dtype], ITEMSIZE[dtype])
    return blocks(num_rows, weight.num_columns, itemsize, rule.block_nbytes)


def _chosen(name: str, num_rows: int, weight: Weight, dtype: str, rule: Rule) -> Iterator[Block]:
    """The blocks to compare: all, or a seeded sample of at least one."""
    every = _blocks(num_rows, weight, dtype, rule)
    if rule.sample >= 1:
        return every
    listed, generator = list(every), random.Random(f"{rule.seed} {name}")
    return iter(sorted(generator.sample(listed, max(1, round(rule.sample * len(listed))))))


def _as(block: np.ndarray, source: str, target: str) -> np.ndarray:
    """A block in another dtype."""
    if source == target:
        return block
    result: np.ndarray = np.empty(block.shape, f"u{ITEMSIZE[target]}")
    cast(np.ascontiguousarray(block), source, result, target)
    return result


def _difference(found: np.ndarray, expected: np.ndarray, block: Block, dtype: str, copy: Weight,
                source: Weight | None, words: str = "") -> DifferenceError | None:
    """The first element that differs: file, parameter, index and both values. `source` is None for padding; `words`:
    those before its value."""
    differs = found != expected
    if not differs.any():
        return None
    down, right = divmod(int(differs.argmax()), found.shape[1])
    row, column = block[0] + down, block[2] + right
    tensor, local = copy.origin_of(row, column)
    index = (row, column)[:len(copy.parameter.matrix_shape)]
    if source is None:
        other = "but it is padding, which must be zero"
    else:
        origin, there = source.origin_of(row, column)
        other = f"{words} {_value(expected[down, right], dtype)} ({quoted(origin.file)}, {list(there)})"
    return DifferenceError(f"{quoted(tensor.file)}: {copy.title} {list(index)} is "
                           f"{_value(found[down, right], dtype)} at {list(local)} of the "
                           f"{'shard' if copy.state else 'file'}; {other}")


def _value(bits: np.unsignedinteger, dtype: str) -> str:
    """An element by value and bits, as in `0.0123 (0x3c4a)`."""
    raw = f"0x{int(bits):0{2 * ITEMSIZE[dtype]}x}"
    if dtype == "BF16":
        return f"{np.array(int(bits) << 16, np.uint32).view(np.float32):.6g} ({raw})"
    kind = {"F16": np.float16, "F32": np.float32, "F64": np.float64}.get(dtype)
    return f"{np.array(bits).view(kind):.6g} ({raw})" if kind else raw
