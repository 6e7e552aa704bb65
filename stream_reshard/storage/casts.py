"""Casts of weights between bfloat16, float16, float32 and float64, by arithmetic on whole arrays of numpy.

Every cast passes through float32, as in torch: a float64 that becomes bfloat16 or float16 is rounded twice. Rounding
is to nearest even. A NaN becomes the quiet NaN of its sign: in torch and numpy its bits depend on the processor.
"""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_CHUNK = 2**16
"""Elements that are cast, or looked at, at a time: what lies between source and result stays in the cache of a core."""


@dataclass(frozen=True)
class _Format:
    """A binary format: sign, exponent, fraction, from the highest bit down."""

    itemsize: int
    num_fraction_bits: int

    @property
    def bits(self) -> str:
        """The dtype of its bits."""
        return f"u{self.itemsize}"

    @property
    def sign(self) -> int:
        """The bits of -0."""
        return 1 << 8 * self.itemsize - 1

    @property
    def infinity(self) -> int:
        """The bits of infinity; those of every NaN are above."""
        return self.sign - (1 << self.num_fraction_bits)

    @property
    def quiet_nan(self) -> int:
        """The bits of the NaN with the highest bit of the fraction alone."""
        return self.infinity | 1 << self.num_fraction_bits - 1


_FORMATS: Mapping[str, _Format] = {"BF16": _Format(2, 7), "F16": _Format(2, 10), "F32": _Format(4, 23),
                                   "F64": _Format(8, 52)}


def cast(source: Any, source_dtype: str, target: Any, target_dtype: str) -> None:
    """Cast the elements in the bytes of `source` into those of `target`; the dtypes differ."""
    assert source_dtype != target_dtype
    known, wanted = _FORMATS[source_dtype], _FORMATS[target_dtype]
    before, after = np.frombuffer(source, known.bits), np.frombuffer(target, wanted.bits)
    space: np.ndarray = np.empty(min(len(before), _CHUNK), np.float32)
    with np.errstate(all="ignore"):
        for start in range(0, len(before), _CHUNK):
            old, new = before[start:start + _CHUNK], after[start:start + _CHUNK]
            values = _widened(old, source_dtype, new if target_dtype == "F32" else space[:len(old)])
            _narrow(values, new, target_dtype)
            if _largest(old) > known.infinity:
                nan_of_sign = (old >= known.sign).astype(wanted.bits) * wanted.sign | wanted.quiet_nan
                np.copyto(new, nan_of_sign, where=old & known.sign - 1 > known.infinity)


def num_overflowed(source: Any, source_dtype: str, target: Any, target_dtype: str, shape: Sequence[int],
                   strides: Sequence[int]) -> int:
    """Number of finite elements that a cast made infinite. Those of this shape and these strides, from the first on,
    are counted."""
    known, wanted = _FORMATS[source_dtype], _FORMATS[target_dtype]
    if wanted.itemsize > known.itemsize or _largest(np.frombuffer(target, wanted.bits)) < wanted.infinity:
        return 0
    old, new = (np.ndarray(shape, of.bits, memory, 0, [step * of.itemsize for step in strides])
                for memory, of in ((source, known), (target, wanted)))
    num_rows = max(1, _CHUNK // math.prod(shape[1:]))
    return sum(int(np.count_nonzero((old[row:row + num_rows] & known.sign - 1 < known.infinity)
                                    & (new[row:row + num_rows] & wanted.sign - 1 == wanted.infinity)))
               for row in range(0, shape[0], num_rows))


def _widened(bits: np.ndarray, dtype: str, space: np.ndarray) -> np.ndarray:
    """The values in float32, in `space` unless they have been float32 before. A float64 is rounded."""
    values: np.ndarray = (bits if dtype == "F32" else space).view(np.float32)
    if dtype == "BF16":  # The upper half of a float32.
        words: np.ndarray = values.view(np.uint32)
        np.copyto(words, bits)
        words <<= 16
    elif dtype != "F32":
        np.copyto(values, bits.view(f"f{bits.itemsize}"), casting="same_kind")
    return values


def _narrow(values: np.ndarray, bits: np.ndarray, dtype: str) -> None:
    """Give `bits` the values in a dtype, unless they are there already: those of float32."""
    if dtype == "F64":
        np.copyto(bits.view(np.float64), values)
    elif dtype != "F32":
        rounded = {"BF16": _bfloat16, "F16": _float16}[dtype](values.view(np.uint32))
        np.copyto(bits, rounded, casting="same_kind")


def _bfloat16(words: np.ndarray) -> np.ndarray:
    """The bits of float32 values in bfloat16. To each half of the last place that stays is added, a bit less where that
    place is even; a carry goes on into the exponent, as it should."""
    rounded: np.ndarray = words >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += words
    rounded >>= 16
    return rounded


def _float16(words: np.ndarray) -> np.ndarray:
    """The bits of float32 values in float16, and of infinity for NaN.

    To each a power of two is added whose last place is that of the value in float16: the addition rounds. numpy's own
    cast raises a flag of the processor for each value that is too small or too large, at 40 times the cost.
    """
    magnitude: np.ndarray = words & 0x7FFFFFFF
    np.minimum(magnitude, 0x47800000, out=magnitude)  # 2 ** 16
    power = magnitude & 0x7F800000
    np.maximum(power, 0x38800000, out=power)  # 2 ** -14: below it all values have one last place.
    power += 13 << 23
    magnitude.view(np.float32)[:] += power.view(np.float32)
    magnitude -= power
    power >>= 13
    magnitude += power
    magnitude -= (127 - 15 + 13 + 1) << 10  # Biases of both, that step of 13, the first bit that float16 leaves out.
    sign = words >> 16
    sign &= 0x8000
    magnitude |= sign
    return magnitude


def _largest(bits: np.ndarray) -> int:
    """The largest of all bits but the sign's. Without a sign, and as whole numbers, those of one sign are in order."""
    sign = 1 << 8 * bits.itemsize - 1
    return max(int(bits.view(f"i{bits.itemsize}").max()), int(bits.max()) & sign - 1)
