"""Differences between two layouts of one model, in words."""
from __future__ import annotations

from collections.abc import Iterator

from stream_reshard.errors import quoted
from stream_reshard.formats.layout import Layout, Slice


def layout_differences(one: Layout, other: Layout) -> Iterator[str]:
    """Differences between two layouts of one model: as a whole, then parameter by parameter."""
    for key, mine in one.facts.items():
        if key in other.facts and mine != other.facts[key]:
            yield f"{key}: {quoted(mine)} and {quoted(other.facts[key])}"
    is_alike = {key: one.facts.get(key) for key in ("format", "tp", "pp")} == {
        key: other.facts.get(key) for key in ("format", "tp", "pp")}
    names = {parameter.name: None for layout in (one, other) for parameter in layout.model.stored()}
    for name in names:
        mine, theirs = one.slices.get(name, ()), other.slices.get(name, ())
        if not mine or not theirs:
            yield f"{name}: only in {quoted((one if mine else other).root)}"
        elif mine[0].tensor.dtype != theirs[0].tensor.dtype:
            yield f"{name}: {mine[0].tensor.dtype} and {theirs[0].tensor.dtype}"
        if is_alike and mine and theirs:
            yield from (f"{name}: {text}" for text in _explained(mine, theirs))


def _explained(mine: tuple[Slice, ...], theirs: tuple[Slice, ...]) -> Iterator[str]:
    """Differences between the places of one parameter."""
    if len(mine) != len(theirs):
        yield f"in {len(mine)} pieces and in {len(theirs)}"
        return
    for here, there in zip(mine, theirs):
        if here.tensor.file != there.tensor.file:
            yield f"in {quoted(here.tensor.file)} and in {quoted(there.tensor.file)}"
        elif here.tensor.shape != there.tensor.shape:
            yield f"{quoted(here.tensor.file)} has the shape {here.tensor.shape} and {there.tensor.shape}"
        elif (here.region, here.place, here.order) != (there.region, there.place, there.order):
            yield f"{quoted(here.tensor.file)} holds other elements, or in another order"
