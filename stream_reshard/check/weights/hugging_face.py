"""A Hugging Face checkpoint, as `verify` reads it: every parameter is one stored matrix."""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stream_reshard.check.weights.checkpoint import Checkpoint, Piece, Weight, matrix_of
from stream_reshard.check.weights.of_layout import WeightsOfLayout
from stream_reshard.errors import Problems, SourceError
from stream_reshard.formats.config_json_limits import quantization_settings, unsupported_settings
from stream_reshard.formats.hugging_face.folder import open_folder
from stream_reshard.formats.hugging_face.layout import HuggingFaceLayout
from stream_reshard.model.box import Box
from stream_reshard.model.truncation import Truncate, untruncated
from stream_reshard.storage.source_file import same_bytes


def open_hugging_face(root: Path, max_header_nbytes: int, problems: Problems,
                      truncate: Truncate = untruncated) -> Checkpoint | None:
    """Read config and headers of the layers that `truncate` takes; every fault goes to `problems`. None if nothing can
    be compared."""
    config, _, layout = open_folder(root, max_header_nbytes, problems, truncate=truncate)
    if config is None or layout is None:
        return None
    for tensor, other in layout.tied():
        if not same_bytes(root, tensor, other):
            problems.append(SourceError(f"{tensor.key} differs from {other.key}, to which it is tied"))
    extras = {setting.name: setting for setting in (*unsupported_settings(config), *quantization_settings(config))
              if setting.name != "hidden_act"}
    return Checkpoint(root, layout.model, config.model.vocab_size, extras, layout.shards, _Weights(layout),
                      dtype=_loaded_as(config.raw))


def _loaded_as(raw: Mapping[str, Any]) -> str | None:
    """The dtype in which transformers loads the weights: `dtype`, else the older `torch_dtype`
    (transformers/configuration_utils.py); None if the config states none."""
    dtype = raw.get("torch_dtype") if raw.get("dtype") is None else raw["dtype"]
    return None if dtype in (None, "auto") else str(dtype).removeprefix("torch.")


class _Weights(WeightsOfLayout):
    """The parameters of a layout of shards, which keeps a few bytes per parameter."""

    def __init__(self, layout: HuggingFaceLayout):
        super().__init__(layout)
        self._layout = layout

    def __getitem__(self, name: str) -> Weight:
        number = self._numbers[name]
        parameter, tensor = self._layout.model.parameter(number), self._layout.tensor_of(number)
        if tensor is None:
            raise KeyError(name)
        whole = Box.whole(matrix_of(parameter.matrix_shape))
        if self._layout.is_transposed(number):
            return Weight(parameter, whole.stop[0], (Piece(whole, tensor, Box.whole(tensor.shape), True),))
        return Weight(parameter, whole.stop[0], (Piece(whole, tensor, whole),))

    def paths_of(self, name: str) -> tuple[str]:
        return (self._layout.shards[self._layout.shard_numbers[self._numbers[name]]],)
