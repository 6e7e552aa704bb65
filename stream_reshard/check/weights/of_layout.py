"""The stored parameters of a layout by their names, for formats that read whole tensors."""
from __future__ import annotations

from collections.abc import Iterator

from stream_reshard.check.weights.checkpoint import Weights
from stream_reshard.formats.layout import Layout


class WeightsOfLayout(Weights):
    """The stored parameters of a layout, which keeps a few bytes for each."""

    def __init__(self, layout: Layout):
        self._numbers = {parameter.name: layout.model.number_of(parameter.name) for parameter in layout.model.stored()}
        self._dtype_at = layout.dtype_at

    def __iter__(self) -> Iterator[str]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    def __contains__(self, name: object) -> bool:
        return name in self._numbers

    def dtype_of(self, name: str) -> str:
        return self._dtype_at(self._numbers[name])
