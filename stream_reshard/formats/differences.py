"""Differences between two layouts of one model, in words."""
from __future__ import annotations

from collections.abc import Iterator

from stream_reshard.errors import quoted
from stream_reshard.formats.layout import Layout, Slice


def layout_differences(one: Layout, other: Layout) -> Iterator[str]:
    """Differences between two layouts of one model: facts first, then parameter by parameter."""
    for key, value in one.facts.items():
        if key in other.facts and value != other.facts[key]:
            yield f"{key}: {quoted(value)} and {quoted(other.facts[key])}"
    are_comparable = all(one.facts.get(key) == other.facts.get(key) for key in ("format", "tp", "pp"))
    names = {parameter.name: None for layout in (one, other) for parameter in layout.model.stored()}
    for name in names:
        left, right = one.slices.get(name, ()), other.slices.get(name, ())
        if not left or not right:
            yield f"{name}: only in {quoted((one if left else other).root)}"
            continue
        if left[0].tensor.dtype != right[0].tensor.dtype:
            yield f"{name}: {left[0].tensor.dtype} and {right[0].tensor.dtype}"
        if are_comparable:
            yield from (f"{name}: {text}" for text in _slice_differences(left, right))


def _slice_differences(left: tuple[Slice, ...], right: tuple[Slice, ...]) -> Iterator[str]:
    """Differences between the slices of one parameter."""
    if len(left) != len(right):
        yield f"in {len(left)} slices and in {len(right)}"
        return
    for one, other in zip(left, right):
        if one.tensor.file != other.tensor.file:
            yield f"in {quoted(one.tensor.file)} and in {quoted(other.tensor.file)}"
        elif one.tensor.shape != other.tensor.shape:
            yield f"{quoted(one.tensor.file)} has the shape {one.tensor.shape} and {other.tensor.shape}"
        elif (one.region, one.place, one.order) != (other.region, other.place, other.order):
            yield f"{quoted(one.tensor.file)} holds other elements, or in another order"
