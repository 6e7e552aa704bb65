"""CRC-32 of bytes that several workers wrote: combined from those of the pieces.

A CRC is the rest of a division of polynomials over GF(2); n bytes more multiply it by x to the power of 8 n before the
next ones are added (zlib, crc32.c: crc32_combine, x2nmodp). Polynomials are written with the bit of x^0 highest.
"""
from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

_POLYNOMIAL = 0xEDB88320
_ONE = 1 << 31


@dataclass(frozen=True, order=True)
class Piece:
    """Bytes of a record that were written together."""

    begin: int
    """Offset in the record, in bytes."""
    nbytes: int
    crc: int
    """Their CRC-32."""


def crc_of(pieces: Iterable[memoryview]) -> int:
    """The CRC-32 of pieces one behind the other."""
    crc = 0
    for piece in pieces:
        crc = zlib.crc32(piece, crc)
    return crc


def combined(first: int, second: int, second_nbytes: int) -> int:
    """The CRC-32 of two stretches of bytes one behind the other, by those of each."""
    return _product(_shift(second_nbytes), first) ^ second


def crc_of_pieces(pieces: Iterable[Piece], nbytes: int) -> int:
    """The CRC-32 of `nbytes` bytes, by those of pieces in any order, which must be all of them, each once."""
    crc = end = 0
    for piece in sorted(pieces):
        assert piece.begin == end, f"a piece begins at byte {piece.begin}, the one before it ends at {end}"
        crc, end = combined(crc, piece.crc, piece.nbytes), end + piece.nbytes
    assert end == nbytes, f"the pieces end at byte {end} of {nbytes}"
    return crc


def _product(one: int, other: int) -> int:
    """The product of two polynomials modulo that of the CRC."""
    product, bit = 0, _ONE
    while bit:
        if one & bit:
            product ^= other
        other = other >> 1 ^ (_POLYNOMIAL if other & 1 else 0)
        bit >>= 1
    return product


@cache
def _power(exponent: int) -> int:
    """x to the power of 2 to the power of `exponent`."""
    return _ONE >> 1 if not exponent else _product(_power(exponent - 1), _power(exponent - 1))


def _shift(nbytes: int) -> int:
    """x to the power of 8 nbytes: what so many bytes more multiply by."""
    shift = _ONE
    for bit in range(nbytes.bit_length()):
        if nbytes >> bit & 1:
            shift = _product(_power(bit + 3), shift)
    return shift
