"""Casts of elements: torch's bits for every value, a rule for NaN, and a count of what became infinite."""
import itertools

import numpy as np
import pytest
from torch_files import TORCH_NAMES

from stream_reshard.storage.casts import _CHUNK, cast, num_overflowed

BITS = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32, "F64": np.uint64}
INFINITY = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000, "F64": 0x7FF0000000000000}
QUIET_NAN = {"BF16": 0x7FC0, "F16": 0x7E00, "F32": 0x7FC00000, "F64": 0x7FF8000000000000}
SIGN = {dtype: 2**(8 * bits().itemsize - 1) for dtype, bits in BITS.items()}
PAIRS = list(itertools.permutations(BITS, 2))


def tensor(torch, bits, dtype):
    return torch.from_numpy(bits.view(f"i{bits.itemsize}")).view(getattr(torch, TORCH_NAMES[dtype]))


def bits_of(torch, values, dtype):
    return values.to(getattr(torch, TORCH_NAMES[dtype])).contiguous().view(
        getattr(torch, f"int{BITS[dtype]().itemsize * 8}")).numpy().view(BITS[dtype])


def every(dtype):
    """All patterns of a dtype of 16 bits, and of others a sample."""
    if BITS[dtype] is np.uint16:
        return np.arange(2**16, dtype=np.uint16)
    return np.random.default_rng(0).integers(0, 2**(8 * BITS[dtype]().itemsize), 2**17, dtype=BITS[dtype])


def around(torch, dtype, other):
    """In a dtype the numbers of another, what lies halfway between neighbours, and the next to these on both sides."""
    positive = np.concatenate([every(other) & (SIGN[other] - 1), np.array([0, INFINITY[other] - 1], BITS[other])])
    numbers = np.unique(tensor(torch, positive[positive < INFINITY[other]], other).double().numpy())
    with np.errstate(over="ignore"):  # Past the largest float64 there is infinity.
        halfway = np.append((numbers[:-1] + numbers[1:]) / 2, numbers[-1] + (numbers[-1] - numbers[-2]) / 2)
    bits = bits_of(torch, torch.from_numpy(np.concatenate([numbers, halfway])), dtype)
    bits = np.concatenate([bits, bits + bits.dtype.type(1), bits - bits.dtype.type(1)])
    return np.concatenate([bits, bits ^ BITS[dtype](SIGN[dtype])])


def result(bits, source, target):
    """(bits after the cast, number of elements that became infinite)."""
    after = np.empty(len(bits), BITS[target])
    cast(bits, source, after, target)
    return after, num_overflowed(bits, source, after, target, bits.shape, [1])


@pytest.mark.parametrize("source, target", PAIRS)
def test_every_value_is_what_torch_makes_of_it(torch, source, target):
    """Numbers, halves and subnormals of every dtype, infinities; and as many become infinite."""
    bits = np.concatenate([every(source), *(around(torch, source, other) for other in BITS)])
    before = tensor(torch, bits, source)
    wanted = before.to(getattr(torch, TORCH_NAMES[target]))
    after, number = result(bits, source, target)
    is_number = ~torch.isnan(before).numpy()
    assert is_number.sum() > 60_000
    np.testing.assert_array_equal(after[is_number], bits_of(torch, wanted, target)[is_number])
    assert number == (torch.isinf(wanted) & torch.isfinite(before)).sum()


@pytest.mark.parametrize("source, target", PAIRS)
def test_a_nan_is_quiet_and_keeps_its_sign(source, target):
    nans = np.array([INFINITY[source] + 1, QUIET_NAN[source], QUIET_NAN[source] + 1, SIGN[source] - 1], BITS[source])
    after, number = result(np.concatenate([nans, nans | BITS[source](SIGN[source])]), source, target)
    assert after.tolist() == [QUIET_NAN[target]] * 4 + [QUIET_NAN[target] | SIGN[target]] * 4 and number == 0


@pytest.mark.parametrize("value, target, overflows", [
    (np.finfo(np.float32).min, "BF16", True), (3.3961775e38, "BF16", True), (3.3961773e38, "BF16", False),
    (-65520, "F16", True), (65519.996, "F16", False), (np.inf, "F16", False), (np.nan, "BF16", False)])
@pytest.mark.parametrize("at", [0, _CHUNK - 1, _CHUNK, 2 * _CHUNK])
def test_one_among_many_is_counted(value, target, overflows, at):
    """The smallest float32 is a usual value of a mask."""
    values = np.zeros(2 * _CHUNK + 1, np.float32)
    values[at] = value
    after, number = result(values.view(np.uint32), "F32", target)
    assert number == overflows and np.count_nonzero(after) == 1


def test_columns_of_a_matrix_are_counted_by_themselves():
    values = np.full((3, 4), 1e6, np.float32)
    after = np.empty((3, 4), np.uint16)
    cast(values, "F32", after, "F16")
    for num_columns in (1, 3, 4):
        assert num_overflowed(values, "F32", after, "F16", (3, num_columns), (4, 1)) == 3 * num_columns
