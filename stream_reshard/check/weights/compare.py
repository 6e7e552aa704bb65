"""Comparing one parameter of two checkpoints, element by element, in blocks of rows."""
from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from stream_reshard.check.weights.checkpoint import Block, Checkpoint, Opened, Weight, blocks
from stream_reshard.errors import DifferenceError, quoted
from stream_reshard.machine.stop import Stop
from stream_reshard.storage.dtypes import ITEMSIZE, TORCH_DTYPES, cast


@dataclass(frozen=True)
class Rule:
    """Settings that the comparisons of all parameters share."""

    block_nbytes: int
    """About the size of what is read of either checkpoint at a time."""
    vocab_size: int
    """Rows of embedding and head that hold weights; rows past them are padding."""
    dtype: str | None = None
    """The safetensors dtype the source is cast to first; None where the copy must have the source's own."""
    sample: float = 1.0
    """Fraction of the blocks that is compared."""
    seed: int = 0
    """Seed for the choice of blocks."""
    padding_is_zero: bool = True
    """True where rows past the vocabulary must be zero in the copy."""
    source_is_told: bool = True
    """True where the source itself, or a user, gives the size of the vocabulary; else rows of the source past the
    copy's vocabulary must be zero."""


@dataclass(frozen=True)
class Compared:
    """Result of comparing one parameter, or the digest of one file."""

    num_elements: int
    """Weights compared, without padding."""
    difference: DifferenceError | None = None
    """The first difference."""
    is_digest: bool = False
    """True where the digest of a file was compared."""


def compare(name: str, source: Checkpoint, copy: Checkpoint, rule: Rule, stop: Stop) -> Compared:
    """Compare a parameter that both have; ends at the first difference."""
    ours, theirs = copy.weights[name], source.weights[name]
    if fault := _shape_fault(ours, theirs, rule, source.is_nanotron == copy.is_nanotron):
        return Compared(0, _shape_difference(ours, fault))
    dtype, num_rows, num_compared = compared_as(name, source, copy, rule), ours.num_true_rows(rule.vocab_size), 0
    with Opened(source.root, theirs, rule.block_nbytes) as expected, Opened(copy.root, ours, rule.block_nbytes) as got:
        for block in _chosen(name, num_rows, ours, dtype, rule):
            stop.check()
            want, have = _as(expected.block(*block), theirs.dtype, dtype), _as(got.block(*block), ours.dtype, dtype)
            num_compared += have.size
            if difference := _difference(have, want, block, dtype, ours, theirs):
                return Compared(num_compared, difference)
        padding = _padding_difference(got, ours, num_rows, rule) if rule.padding_is_zero else None
        if padding is None and not rule.source_is_told:
            padding = _hidden_difference(expected, theirs, num_rows, copy, rule)
        return Compared(num_compared, padding)


def _padding_difference(got: Opened, ours: Weight, num_rows: int, rule: Rule) -> DifferenceError | None:
    """The first element of the copy's padding that is not zero."""
    for first, last, left, right in _blocks(ours.num_rows - num_rows, ours, ours.dtype, rule):
        have = got.block(num_rows + first, num_rows + last, left, right)
        block = num_rows + first, num_rows + last, left, right
        if difference := _difference(have, np.zeros_like(have), block, ours.dtype, ours, None):
            return difference
    return None


def _hidden_difference(expected: Opened, theirs: Weight, num_rows: int, copy: Checkpoint,
                       rule: Rule) -> DifferenceError | None:
    """The first row of the source past the copy's vocabulary that is not zero: only a user can call it padding."""
    for first, last, left, right in _blocks(theirs.num_rows - num_rows, theirs, theirs.dtype, rule):
        rows = expected.block(num_rows + first, num_rows + last, left, right).any(axis=1)
        if rows.any():
            row = num_rows + first + int(rows.argmax())
            tensor, _ = theirs.origin_of(row, left)
            return DifferenceError(
                f"{_title(theirs)}: row {row} of the source is not zero ({quoted(tensor.file)}), but "
                f"{quoted(copy.root)} has a vocabulary of {num_rows} rows; --vocab-size {num_rows} says that what "
                f"follows in the source is padding")
    return None


def _title(weight: Weight) -> str:
    return weight.parameter.hugging_face


def shape_difference(name: str, source: Checkpoint, copy: Checkpoint, rule: Rule) -> DifferenceError | None:
    """A difference where a parameter's shape or dtype is not what the source asks for."""
    ours = copy.weights[name]
    fault = _shape_fault(ours, source.weights[name], rule, source.is_nanotron == copy.is_nanotron)
    return _shape_difference(ours, fault) if fault else None


def _shape_difference(ours: Weight, fault: str) -> DifferenceError:
    return DifferenceError(f"{quoted(ours.pieces[0].tensor.file)}: {_title(ours)} {fault}")


def _shape_fault(ours: Weight, theirs: Weight, rule: Rule, are_same_format: bool) -> str | None:
    is_vocab = ours.parameter.dims[0] == "vocab"
    shapes = (ours.num_rows, ours.num_columns), (theirs.num_rows, theirs.num_columns)
    if ours.num_columns != theirs.num_columns or (ours.num_rows != theirs.num_rows and not is_vocab):
        return f"has the shape {shapes[0]}, in the source {shapes[1]}"
    if is_vocab and min(ours.num_rows, theirs.num_rows) < rule.vocab_size:
        return f"has {ours.num_rows} rows, in the source {theirs.num_rows}, for a vocabulary of {rule.vocab_size}"
    wanted = {rule.dtype or theirs.dtype}
    if ours.parameter.is_float32:
        wanted = wanted | {"F32"} if rule.dtype else wanted if are_same_format else set(TORCH_DTYPES)
    if ours.dtype not in wanted or (theirs.dtype != ours.dtype and theirs.dtype not in TORCH_DTYPES):
        cast_to = f", cast to {rule.dtype}" if rule.dtype else ""
        return f"has the dtype {ours.dtype}, in the source {theirs.dtype}{cast_to}"
    return None


def compared_as(name: str, source: Checkpoint, copy: Checkpoint, rule: Rule) -> str:
    """The dtype in which two parameters are compared: the copy's, to which the source is cast. Where no cast is asked
    for, but Nanotron keeps the parameter in float32, the narrower side is widened, so that no bit is lost silently."""
    ours, theirs = copy.weights.dtype_of(name), source.weights.dtype_of(name)
    if rule.dtype or ours == theirs or not copy.weights[name].parameter.is_float32:
        return ours
    return "F64" if "F64" in (ours, theirs) else "F32"


def is_widening(source: str, target: str) -> bool:
    """True where a cast widens, so that no bit is lost."""
    return target in ("F32", "F64") and source in TORCH_DTYPES and ITEMSIZE[source] < ITEMSIZE[target]


def _blocks(num_rows: int, weight: Weight, dtype: str, rule: Rule) -> Iterator[Block]:
    itemsize = max(ITEMSIZE[weight.dtype], ITEMSIZE[dtype])
    return blocks(num_rows, weight.num_columns, itemsize, rule.block_nbytes)


def _chosen(name: str, num_rows: int, weight: Weight, dtype: str, rule: Rule) -> Iterator[Block]:
    """The blocks to compare: all of them, or a seeded part, at least one."""
    every = _blocks(num_rows, weight, dtype, rule)
    if rule.sample >= 1:
        return every
    listed, chooser = list(every), random.Random(f"{rule.seed} {name}")
    return iter(sorted(chooser.sample(listed, max(1, round(rule.sample * len(listed))))))


def _as(block: np.ndarray, source: str, target: str) -> np.ndarray:
    """A block in another dtype. Where no bit is lost, numpy does it: torch need not be there."""
    if source == target:
        return block
    if is_widening(source, target):
        wide = (block.astype(np.uint32) << 16).view(np.float32) if source == "BF16" else block.view(
            {"F16": np.float16, "F32": np.float32}[source])
        return wide.astype({"F32": np.float32, "F64": np.float64}[target]).view(f"u{ITEMSIZE[target]}")
    bits = cast(np.ascontiguousarray(block).data.cast("B"), source, target)
    narrow: np.ndarray = np.frombuffer(bits, f"u{ITEMSIZE[target]}").reshape(block.shape)
    return narrow


def _difference(have: np.ndarray, want: np.ndarray, block: Block, dtype: str, ours: Weight,
                theirs: Weight | None) -> DifferenceError | None:
    """The first element that differs, by file, parameter, index and both values. `theirs` is None for padding."""
    differs = have != want
    if not differs.any():
        return None
    down, right = divmod(int(differs.argmax()), have.shape[1])
    row, column = block[0] + down, block[2] + right
    tensor, local = ours.origin_of(row, column)
    index = (row, column)[:len(ours.parameter.matrix_shape)]
    if theirs is None:
        other = "but it is padding, which must be zero"
    else:
        origin, there = theirs.origin_of(row, column)
        other = f"the source has {_value(want[down, right], dtype)} ({quoted(origin.file)}, {list(there)})"
    return DifferenceError(f"{quoted(tensor.file)}: {_title(ours)} {list(index)} is "
                           f"{_value(have[down, right], dtype)} at {list(local)} of the file; {other}")


def _value(bits: np.unsignedinteger, dtype: str) -> str:
    """`0.0123 (0x3c4a)`."""
    raw = f"0x{int(bits):0{2 * ITEMSIZE[dtype]}x}"
    if dtype == "BF16":
        return f"{np.array(int(bits) << 16, np.uint32).view(np.float32):.6g} ({raw})"
    kind = {"F16": np.float16, "F32": np.float32, "F64": np.float64}.get(dtype)
    return f"{np.array(bits).view(kind):.6g} ({raw})" if kind else raw
