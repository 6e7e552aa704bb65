"""A folder of Meta's parts, as `verify` reads it: a matrix is the tensors of all parts, below or beside each other.

Which of the two follows from the shapes alone. In q and k the rows of a head alternate between its two halves.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from stream_reshard.check.weights.checkpoint import Checkpoint, Piece, Weight, matrix_of
from stream_reshard.check.weights.of_layout import WeightsOfLayout
from stream_reshard.errors import Problems
from stream_reshard.formats.config_json_limits import quantization_settings, unsupported_settings
from stream_reshard.formats.meta.folder import open_folder
from stream_reshard.formats.meta.layout import MetaLayout
from stream_reshard.model.box import Box
from stream_reshard.model.truncation import Truncate, untruncated
from stream_reshard.storage.header import StoredTensor


def open_meta(root: Path, max_header_nbytes: int, problems: Problems,
              truncate: Truncate = untruncated) -> Checkpoint | None:
    """Read settings and parts of the layers that `truncate` takes; every fault goes to `problems`. None if nothing can
    be compared."""
    config, _, layout = open_folder(root, max_header_nbytes, problems, truncate)
    if config is None or layout is None:
        return None
    extras = {setting.name: setting for setting in (*unsupported_settings(config), *quantization_settings(config))
              if setting.name != "hidden_act"}
    return Checkpoint(root, layout.model, config.model.vocab_size, extras, layout.parts, _Weights(layout))


class _Weights(WeightsOfLayout):
    """The parameters of a layout of parts, which keeps a few bytes per parameter and part."""

    def __init__(self, layout: MetaLayout):
        super().__init__(layout)
        self._layout = layout

    def __getitem__(self, name: str) -> Weight:
        number = self._numbers[name]
        parameter = self._layout.model.parameter(number)
        num_rows, num_columns = matrix_of(parameter.matrix_shape)
        pieces = tuple(_pieces(num_rows, num_columns, self._layout.tensors_of(number)))
        return Weight(parameter, num_rows, pieces, "half" in parameter.dims)

    def paths_of(self, name: str) -> list[str]:
        return [piece.tensor.file for piece in self[name].pieces]


def _pieces(num_rows: int, num_columns: int, tensors: Sequence[StoredTensor]) -> Iterator[Piece]:
    """The pieces of a matrix, up to the part with which it is whole: what every part has is taken from the first."""
    top = left = 0
    for tensor in tensors:
        local = Box.whole(matrix_of(tensor.shape))
        height, width = local.stop
        yield Piece(Box((top, left), (top + height, left + width)), tensor, local)
        top, left = (top + height, 0) if width == num_columns else (top, left + width)
        if top == num_rows or left == num_columns:
            return
