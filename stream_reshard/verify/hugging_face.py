"""A Hugging Face checkpoint as verify sees it: every parameter is one stored matrix."""
from __future__ import annotations

import os
from pathlib import Path

from stream_reshard.architectures import build_model
from stream_reshard.box import Box
from stream_reshard.errors import Problems, SourceError, quoted
from stream_reshard.layouts.hf_shards import open_shards
from stream_reshard.layouts.hugging_face import layout_of, model_of, open_config
from stream_reshard.layouts.hf_limits import limits
from stream_reshard.tensor_file import same_bytes
from stream_reshard.verify.checkpoint import PER_TENSOR, Checkpoint, Piece, Weight, matrix_of


def open_hugging_face(root: Path, max_header_nbytes: int, problems: Problems) -> Checkpoint | None:
    """Read config and headers; everything wrong goes to `problems`. None where nothing can be compared."""
    config = problems.collect(open_config, root, max_header_nbytes)
    table = build_model(config.family, config.model) if config else None
    shards = problems.collect(open_shards, root, table, max_header_nbytes) if os.path.isdir(root) else None
    if config is None or shards is None:
        return None
    if shards.num_tensors * PER_TENSOR > max_header_nbytes:
        problems.append(SourceError(f"{quoted(root)} has {shards.num_tensors} tensors, too many to be compared within "
                                    f"--max-memory; raise it"))
        return None
    model = problems.collect(model_of, config, shards)
    layout = problems.collect(layout_of, root, model, shards, max_header_nbytes) if model else None
    if layout is None:
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
    extras = {limit.name: limit for limit in limits(config) if limit.name != "hidden_act"}
    return Checkpoint(root, config.model, config.model.vocab_size, extras, False, False, tuple(layout.files), weights)
