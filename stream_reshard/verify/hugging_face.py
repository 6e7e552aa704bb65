"""A Hugging Face checkpoint as verify sees it: every parameter is one stored matrix."""
from __future__ import annotations

import os
from pathlib import Path

from stream_reshard.box import Box
from stream_reshard.errors import Problems, SourceError
from stream_reshard.layouts.hugging_face import layout_of, model_of, open_config, open_files
from stream_reshard.layouts.nanotron import NanotronFormat
from stream_reshard.layouts.nanotron_limits import limits
from stream_reshard.tensor_file import same_bytes
from stream_reshard.topology import Topology
from stream_reshard.verify.checkpoint import Checkpoint, Piece, Weight, matrix_of


def open_hugging_face(root: Path, max_header_nbytes: int, problems: Problems) -> Checkpoint | None:
    """Read config and headers; everything wrong goes to `problems`. None where nothing can be compared."""
    config = problems.collect(open_config, root, max_header_nbytes)
    files = problems.collect(open_files, root, max_header_nbytes) if os.path.isdir(root) else None
    if config is None or files is None:
        return None
    model = problems.collect(model_of, config, files)
    layout = problems.collect(layout_of, root, model, files) if model else None
    if layout is None:
        return None
    tensors = {tensor.key: tensor for tensor in layout.tensors()}
    weights = {}
    for parameter in layout.model.parameters:
        if parameter.tied_to is None:
            tensor, whole = tensors[parameter.hugging_face], Box.whole(matrix_of(parameter.matrix_shape))
            weights[parameter.name] = Weight(parameter, whole.stop[0], (Piece(whole, tensor, whole),))
        elif parameter.hugging_face in tensors:
            other = tensors[layout.model.by_name[parameter.tied_to].hugging_face]
            if not same_bytes(root, tensors[parameter.hugging_face], other):
                problems.append(SourceError(f"{parameter.hugging_face} differs from {other.key}, to which it is tied"))
    extras = {limit.name: limit for limit in limits(config, NanotronFormat(Topology())) if limit.name != "hidden_act"}
    return Checkpoint(root, config.model, config.model.vocab_size, extras, False, False, files, weights)
