"""A Hugging Face checkpoint as verify sees it: every parameter is one stored matrix."""
from __future__ import annotations

from functools import partial
from pathlib import Path

from stream_reshard.box import Box
from stream_reshard.errors import Problems, SourceError, quoted
from stream_reshard.layouts.hf_shards import Shards
from stream_reshard.layouts.hugging_face import open_folder
from stream_reshard.layouts.hf_limits import limits, quantization_limits
from stream_reshard.tensor_file import same_bytes
from stream_reshard.verify.checkpoint import PER_TENSOR, Checkpoint, Piece, Weight, matrix_of


def open_hugging_face(root: Path, max_header_nbytes: int, problems: Problems) -> Checkpoint | None:
    """Read config and headers; everything wrong goes to `problems`. None where nothing can be compared."""
    config, _, layout = open_folder(root, max_header_nbytes, problems, partial(_check_number, root, max_header_nbytes))
    if config is None or layout is None:
        return None
    weights = {}
    for parameter in layout.model.stored():
        tensor = layout.tensor_of(layout.model.number_of(parameter.name))
        whole = Box.whole(matrix_of(parameter.matrix_shape))
        assert tensor, "a layout has every parameter that is stored"
        weights[parameter.name] = Weight(parameter, whole.stop[0], (Piece(whole, tensor, whole),))
    for tensor, other in layout.tied():
        if not same_bytes(root, tensor, other):
            problems.append(SourceError(f"{tensor.key} differs from {other.key}, to which it is tied"))
    extras = {limit.name: limit for limit in (*limits(config), *quantization_limits(config))
              if limit.name != "hidden_act"}
    return Checkpoint(root, config.model, config.model.vocab_size, extras, False, False, tuple(layout.files), weights)


def _check_number(root: Path, max_header_nbytes: int, shards: Shards) -> None:
    if shards.num_tensors * PER_TENSOR > max_header_nbytes:
        raise SourceError(f"{quoted(root)} has {shards.num_tensors} tensors, too many to be compared within "
                          f"--max-memory; raise it")
